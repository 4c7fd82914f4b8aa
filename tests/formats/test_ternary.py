"""SPEC 7.15 and 7.16: streams by hand, against what is known of them, and any matrix through them."""

import itertools

import numpy as np
import pytest
from format_samples import f16
from golden_samples_1_2 import by_hand
from hypothesis import given, settings
from hypothesis import strategies as st
from independent_ternary import phrase as independent_phrase
from invoke import python
from test_layer_kinds import check_any_rows, check_bits_agree, parts_of

from formats.encoding import encoding_of
from formats.encoding.ternary_dict import SHARES
from formats.errors import FormatError
from formats.kernels.ternary import USUAL_SHARES, codewords_of, encode_dict, encode_rans
from formats.layer import TernaryLinear, dequantize
from formats.ternary import LENGTH_BIT, fitted_frequencies, longer_phrases, phrases, symbol_digits

CODINGS = ("ternary_dict", "ternary_rans")
# Zero rate -> bits a weight of a dictionary made for it, as QMoE's was for 0.885; an independent measurement.
MATCHED = {
    0.33: 1.606,
    0.45: 1.587,
    0.50: 1.550,
    0.60: 1.453,
    0.70: 1.252,
    0.80: 1.009,
    0.857: 0.835,
    0.864: 0.806,
    0.886: 0.733,
    0.92: 0.639,
}


def drawn(zeros: float, shape: tuple[int, int], lows: float = 0.5, seed: int = 0) -> np.ndarray:
    """Independent values, of which so many are 0 and, of the others, so many -1.  -> i8"""
    uniform = np.random.default_rng(seed).random(shape, np.float32)
    return np.where(uniform < zeros, 0, np.where(uniform < zeros + (1 - zeros) * lows, -1, 1)).astype(np.int8)


def entropy(zeros: float) -> float:
    """Bits of a value, if -1 and 1 are as likely."""
    return float(-zeros * np.log2(zeros) - (1 - zeros) * np.log2((1 - zeros) / 2))


def ternary(codes: np.ndarray, coding: str, scaled: bool = False) -> TernaryLinear:
    scales = (np.arange(2 * len(codes)).reshape(-1, 2) % 7 - 3).astype(np.float16) / 4
    inputs = (np.arange(codes.shape[1]) % 5 + 1).astype(np.float16) / 4 if scaled else None
    return TernaryLinear(codes=codes, scales=scales, input_scales=inputs, coding=coding)


def spelt(packed: int) -> list[int]:
    """The values of a packed phrase."""
    return [(0, -1, 1)[packed >> 2 * i & 3] for i in range(2 * (packed >> LENGTH_BIT))]


# The dictionary


def test_spec_7_15_2_the_first_codewords_by_hand():
    """Of 256 values 254 are zero: after the single pairs, zeros alone; then phrases with one value beside them."""
    table = phrases(1, 1).tolist()
    assert [spelt(packed) for packed in table[:9]] == [[u, v] for u in (0, -1, 1) for v in (0, -1, 1)]
    assert [spelt(packed) for packed in table[9:22]] == [[0, 0] * pairs for pairs in range(2, 15)]
    assert [spelt(packed) for packed in table[22:26]] == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    assert [spelt(packed) for packed in table[26:30]] == [[0, 0, 0, -1], [0, 0, -1, 0], [0, -1, 0, 0], [-1, 0, 0, 0]]
    assert spelt(table[30]) == [0, 0, 0, 0, 0, 1]


def test_spec_7_15_2_likelier_comes_first_whatever_its_length():
    """Half of the values are -1, a quarter 0 and a quarter 1."""
    table = [spelt(packed) for packed in phrases(128, 64).tolist()]
    assert table[9] == [-1, -1, -1, -1]  # 2^-4
    assert table[10:14] == [[0, -1, -1, -1], [-1, 0, -1, -1], [-1, -1, 0, -1], [-1, -1, -1, 0]]  # 2^-5, no 1
    assert (table[14], table[17]) == ([-1, -1, -1, 1], [1, -1, -1, -1])  # 2^-5 too
    assert (table[18], table[41]) == ([0, 0, -1, -1], [1, 1, -1, -1])  # 2^-6, two pairs
    assert table[42] == [-1] * 6  # 2^-6, three


@pytest.mark.parametrize("shares", [(1, 1), (15, 15), (85, 86), (254, 1), (1, 254), (40, 3)])
def test_spec_7_15_2_the_table_is_that_of_a_phrase_at_a_time(shares):
    table = phrases(*shares)
    assert len(np.unique(table)) == 65536
    for codeword in [*range(40), *range(40, 65536, 1201), 65535]:
        assert spelt(int(table[codeword])) == independent_phrase(codeword, *shares)


@pytest.mark.parametrize("shares", [(1, 1), (15, 15), (85, 86), (254, 1), (40, 3)])
def test_a_part_of_a_phrase_is_a_phrase(shares):
    """Its beginnings, so that a walk finds it pair by pair; its ends, so that no parse beats the longest phrase."""
    known = {tuple(spelt(packed)) for packed in phrases(*shares).tolist()}
    assert all(each[:-2] in known and each[2:] in known for each in known if len(each) > 2)
    assert np.count_nonzero(longer_phrases(*shares)) == 65536 - 9


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.3, 0.6, 0.9]), st.integers(1, 90), st.integers(0, 1000))
def test_no_parse_has_fewer_codewords(zeros, n_in, seed):
    codes = drawn(zeros, (1, n_in), seed=seed)
    stream = encode_dict(codes)
    known = {
        tuple(spelt(packed)) for packed in phrases(stream.fields["share_low"], stream.fields["share_high"]).tolist()
    }
    row = [*codes[0].tolist(), *[0] * (n_in % 2)]
    fewest = [0] + [len(row)] * (len(row) // 2)  # codewords of the first so many pairs
    for end, start in itertools.product(range(1, len(fewest)), range(len(fewest))):
        if start < end and tuple(row[2 * start : 2 * end]) in known:
            fewest[end] = min(fewest[end], fewest[start] + 1)
    assert stream.fields["codewords"] == fewest[-1]


@pytest.mark.parametrize(("zeros", "bits"), MATCHED.items())
def test_a_dictionary_of_the_measured_shares_costs_what_is_known_of_it(zeros, bits):
    """Within 2 % of the independent measurement; what is chosen costs no more."""
    codes = drawn(zeros, (256, 4096))
    share = round(SHARES * (1 - zeros) / 2)
    matched = 16 * len(codewords_of(codes, share, share)[0]) / codes.size
    assert matched == pytest.approx(bits, rel=0.02)
    assert 16 * encode_dict(codes).fields["codewords"] / codes.size <= 1.005 * matched  # of few usual ones, by a sample


def test_qmoe_s_zero_rate_takes_less_than_three_quarters_of_a_bit():
    codes = drawn(0.885, (512, 4096))
    assert 16 * encode_dict(codes).fields["codewords"] / codes.size <= 0.735


def test_few_dictionaries_are_used_whatever_the_values_are():
    assert len(USUAL_SHARES) <= 32
    for zeros, lows in itertools.product((0, 0.3, 0.7, 0.95, 1), (0, 0.1, 0.9)):
        generator = np.random.default_rng(0)
        codes = np.where(generator.random((8, 64)) < lows, -1, 1).astype(np.int8)
        codes[generator.random((8, 64)) < zeros] = 0
        fields = encode_dict(codes).fields
        assert fields["share_low"] == fields["share_high"] in USUAL_SHARES


# Numeral systems


def test_spec_7_16_4_one_lane_by_hand():
    """Symbols 1 and 0, 8192 slots each. Backwards from 65536: 0 gives 8 * 16384, 1 gives 16 * 16384 + 8192."""
    codes = np.zeros((1, 10), np.int8)
    codes[0, 0] = -1
    stream = encode_rans(codes)
    assert dict(stream.fields) == {"segment": 10, "words": 0}
    assert stream.parts["frequencies"][:3].tolist() == [8192, 8192, 0]
    assert stream.parts["states"].tolist() == [[270336]]
    assert stream.parts["word_blocks"].tolist() == [0, 0]


def test_spec_7_16_4_words_are_taken_in_the_order_in_which_lanes_ask():
    """Two lanes whose symbols, 1 slot of 16384 each, ask for a word nearly every time."""
    codes = drawn(0.4, (2, 60))
    stream = encode_rans(codes)
    frequencies = stream.parts["frequencies"].astype(int)
    starts, words = np.cumsum(frequencies) - frequencies, iter(stream.parts["words"].tolist())
    x = stream.parts["states"][:, 0].astype(int).tolist()
    for step in range(12):
        for lane in (0, 1):
            five = codes[lane, 5 * step : 5 * step + 5] % 3  # -1 becomes 2
            symbol = int(((0, 2, 1) @ np.eye(3, dtype=int)[five].T) @ 3 ** np.arange(5))
            assert starts[symbol] <= x[lane] % 16384 < starts[symbol] + frequencies[symbol]
            x[lane] = frequencies[symbol] * (x[lane] // 16384) + x[lane] % 16384 - starts[symbol]
            if x[lane] < 65536:
                x[lane] = 65536 * x[lane] + next(words)
    assert x == [65536, 65536] and next(words, None) is None and stream.fields["words"] > 4


def test_spec_7_16_1_the_values_of_a_symbol():
    digits = symbol_digits()
    assert digits[0] == 0 and digits[1] == 1 and digits[2 * 81 + 9] == 2 << 8 | 1 << 4
    assert len(set(digits.tolist())) == 243


def test_spec_7_16_2_frequencies_add_up_and_leave_no_symbol_out():
    rare = np.ones(243, np.int64)
    rare[0] = 10**7
    for counts in (rare, np.arange(243) ** 4, np.eye(243, dtype=np.int64)[7], np.arange(243) // 200, rare[::-1]):
        frequencies, _ = fitted_frequencies(np.ascontiguousarray(counts))
        assert frequencies.sum(dtype=int) == 16384 and ((frequencies > 0) == (counts > 0)).all()


@pytest.mark.parametrize("zeros", [0.1, 0.33, 0.6, 0.885, 0.95, 0.99])
def test_numeral_systems_come_within_three_percent_of_the_entropy(zeros):
    """Words and states together; a row must be long for the state to be small beside it."""
    codes = drawn(zeros, (64, 32768 if zeros > 0.95 else 8192))
    stream = encode_rans(codes)
    bits = 16 * stream.fields["words"] + 32 * stream.parts["states"].size + 32 * stream.parts["word_blocks"].size
    assert bits / codes.size <= 1.03 * entropy(zeros)


# Both


@pytest.mark.parametrize("coding", CODINGS)
def test_a_tiny_matrix_by_hand(coding):
    layer = TernaryLinear(codes=by_hand().codes, scales=by_hand().scales, coding=coding)
    weight = dequantize(layer)
    assert weight.tolist() == [[0, -1, 0.5, 0.5, 0], [0, 0, 0, 0, 2]]
    assert np.signbit(weight[1, 0]) and not np.signbit(weight[1, 1])  # +1 of row 1 stands for -0, a zero is +0
    check_bits_agree(layer)


@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 120)),
    zeros=st.sampled_from([0.0, 0.2, 0.5, 0.885, 0.99, 1.0]),
    lows=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    coding=st.sampled_from(CODINGS),
    data=st.data(),
)
def test_spec_7_15_any_ternary_matrix(shape, zeros, lows, coding, data):
    layer = ternary(drawn(zeros, shape, lows, seed=sum(shape)), coding, scaled=shape[1] % 3 == 0)
    check_bits_agree(layer)
    check_any_rows(layer, data)


@pytest.mark.parametrize("coding", CODINGS)
def test_a_row_of_several_segments_and_a_real_shape(coding):
    layer = ternary(drawn(0.5, (40, 6001)), coding)
    check_bits_agree(layer)
    if coding == "ternary_rans":
        assert parts_of(layer)["states"].shape == (40, 3) and encoding_of(layer).segment == 2010
    check_bits_agree(ternary(drawn(0.885, (576, 1536)), coding))


@pytest.mark.parametrize("coding", CODINGS)
def test_a_listing_says_how_many_bits_a_value_takes_rounded_up(coding):
    assert [encoding_of(ternary(drawn(p, (64, 640)), coding)).describe((64, 640)).bits for p in (0.9, 0.3)] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coding": "ternary"}, r"coding='ternary': must be ternary_dict or ternary_rans \(SPEC 7.15, 7.16\)"),
        ({"codes": np.zeros((2, 5), np.uint8)}, r"codes are uint8\[2, 5\]: must be int8\[2, 5\] \(SPEC 7.15\)"),
        ({"codes": np.zeros(5, np.int8)}, r"codes \[5\]: must be \[out, in\], not empty"),
        ({"codes": np.zeros((0, 5), np.int8)}, "not empty"),
        ({"codes": np.full((2, 5), 2, np.int8)}, "codes go from 2 to 2: must be -1, 0 or 1"),
        ({"codes": np.full((2, 5), -2, np.int8)}, "codes go from -2 to -2: must be -1, 0 or 1"),
        ({"scales": np.ones((2, 3), np.float16)}, r"scales are float16\[2, 3\]: must be float16\[2, 2\]"),
        ({"scales": f16([0x7C00, 0, 0, 0]).reshape(2, 2)}, "a scale is NaN or infinite"),
        ({"input_scales": np.zeros(5, np.float16)}, "an input scale is NaN, infinite or not above 0"),
        ({"input_scales": np.ones(4, np.float16)}, r"input_scales are float16\[4\]: must be float16\[5\]"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(changes, message):
    values = {"codes": by_hand().codes, "scales": by_hand().scales}
    with pytest.raises(FormatError, match=message):
        TernaryLinear(**(values | changes))


GARBAGE = """
import numpy as np, torch
from formats.encoding import TernaryDict, TernaryRans
from formats.kernels import cpu_linear

rng = np.random.default_rng(0)
shape = (37, 61)
for encoding in (
    TernaryDict(share_low=20, share_high=30, codewords=37 * 3), TernaryDict(share_low=1, share_high=1, codewords=900),
    TernaryRans(segment=20, words=0), TernaryRans(segment=30, words=1), TernaryRans(segment=90, words=400),
):
    for kind in range(40):
        section = rng.integers(0, 256, encoding.section_bytes(shape), np.uint8)
        section[rng.integers(0, len(section), len(section) * (kind % 4) // 3)] = 255 * (kind % 2)
        for part in encoding.parts(shape):
            if part.name == "scales" or kind >= 20 and part.name in ("codeword_rows", "word_blocks"):
                section[part.offset_bytes : part.end_bytes] = 0
        found = cpu_linear.decode_rows(torch.from_numpy(section), torch.arange(37), encoding, shape)
        assert found.shape == shape and not found.any()
        arrays = {p.name: section[p.offset_bytes : p.end_bytes].view(p.dtype).reshape(p.shape) for p in
                  encoding.parts(shape)}
        try:
            encoding.check_values(arrays, shape)
        except ValueError as error:
            assert "SPEC 7.1" in str(error), error
"""


def test_whatever_the_bytes_are_nothing_beyond_an_array_is_touched(tmp_path, monkeypatch):
    """Compiled anew with every index checked: an index beyond its array would be an IndexError."""
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    result = python("-c", GARBAGE)
    assert result.returncode == 0, result.stderr
