import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.bitpack import has_unused_bits, pack_codes, unpack_codes
from formats.encoding import plane_widths, row_words
from formats.errors import FormatError

ALL_BITS = range(2, 9)


def known_codes(bits: int, n: int = 64) -> np.ndarray:
    return ((7 * np.arange(n)) % (1 << bits)).astype(np.uint8)[None]


@pytest.mark.parametrize(
    ("bits", "widths"),
    [(2, (2,)), (3, (2, 1)), (4, (4,)), (5, (4, 1)), (6, (4, 2)), (7, (4, 2, 1)), (8, (8,))],
)
def test_spec_7_4_1_plane_widths(bits, widths):
    assert plane_widths(bits) == widths


def test_spec_7_4_2_words_of_a_row():
    assert [row_words(n, 1) for n in (1, 32, 33)] == [1, 1, 2]
    assert [row_words(n, 4) for n in (1, 8, 9)] == [1, 1, 2]
    assert row_words(5, 8) == 2


def test_spec_7_4_3_two_bits_by_hand():
    [plane] = pack_codes(np.array([[1, 2, 3]], np.uint8), 2)
    assert plane.tolist() == [[0b11_10_01]]


def test_spec_7_4_3_three_bits_by_hand():
    """Codes 1, 6, 3 = 0b001, 0b110, 0b011: the low two bits first, then the top bit on its own."""
    low, high = pack_codes(np.array([[0b001, 0b110, 0b011]], np.uint8), 3)
    assert low.tolist() == [[0b11_10_01]]
    assert high.tolist() == [[0b0_1_0]]


def test_spec_7_4_3_seven_bits_by_hand():
    planes = pack_codes(np.array([[0b1_10_0011, 0b0_01_1111]], np.uint8), 7)
    assert [plane.tolist() for plane in planes] == [[[0b1111_0011]], [[0b01_10]], [[0b0_1]]]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "6c6c6c6c 6c6c6c6c 6c6c6c6c 6c6c6c6c"),
        (4, "1a3c5e70 92b4d6f8 1a3c5e70 92b4d6f8 1a3c5e70 92b4d6f8 1a3c5e70 92b4d6f8"),
        (8, "150e0700 312a231c 4d463f38 69625b54 857e7770 a19a938c bdb6afa8 d9d2cbc4"),
    ],
)
def test_known_answer_of_a_dense_stream(bits, words):
    """With one plane the layout is the dense little-endian stream that GPTQ and compressed-tensors store."""
    [plane] = pack_codes(known_codes(bits), bits)
    want = words.split()
    assert [f"{word:08x}" for word in plane[0]][: len(want)] == want


def test_known_answer_of_three_bit_planes():
    """7k mod 8 counts down 0 7 6 5 4 3 2 1: low pairs 0 3 2 1, twice; top bits 0 1 1 1 1 0 0 0."""
    low, high = pack_codes(known_codes(3), 3)
    assert {f"{word:08x}" for word in low[0]} == {"6c6c6c6c"}
    assert {f"{word:08x}" for word in high[0]} == {"1e1e1e1e"}


def test_rows_start_on_their_own_word():
    [plane] = pack_codes(np.array([[1], [2]], np.uint8), 4)
    assert plane.tolist() == [[1], [2]]


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("n", [1, 7, 8, 31, 32, 33, 576])
def test_unpack_inverts_pack(bits, n):
    codes = np.stack([np.resize(np.arange(1 << bits), n), np.full(n, (1 << bits) - 1)]).astype(np.uint8)
    planes = pack_codes(codes, bits)
    assert np.array_equal(unpack_codes(planes, bits, n), codes)
    assert sum(plane.shape[1] for plane in planes) == sum(-(-n * w // 32) for w in plane_widths(bits))


@given(st.data(), st.sampled_from(ALL_BITS), st.integers(1, 3), st.integers(1, 130))
def test_unpack_inverts_pack_for_any_codes(data, bits, rows, n):
    raw = data.draw(st.binary(min_size=rows * n, max_size=rows * n))
    codes = np.frombuffer(raw, np.uint8).reshape(rows, n) & np.uint8((1 << bits) - 1)
    planes = pack_codes(codes, bits)
    assert np.array_equal(unpack_codes(planes, bits, n), codes)
    for plane, width in zip(planes, plane_widths(bits), strict=True):
        assert plane.dtype == np.dtype("<u4")
        assert not has_unused_bits(plane, width, n)


def test_spec_7_4_4_unused_bits_are_seen():
    assert has_unused_bits(np.array([[0], [1 << 12]], np.uint32), width=4, n=3)
    assert not has_unused_bits(np.array([[0], [1 << 11]], np.uint32), width=4, n=3)
    assert not has_unused_bits(np.array([[0xFFFFFFFF]], np.uint32), width=4, n=8)


@pytest.mark.parametrize("bits", [-1, 0, 9, 32])
def test_spec_7_4_1_other_widths_are_refused(bits):
    with pytest.raises(FormatError, match=rf"bits={bits}: must be 1 to 8 \(SPEC 7.4.1\)"):
        plane_widths(bits)


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="code 8 does not fit 3 bits"):
        pack_codes(np.array([[8]], np.uint8), 3)


@pytest.mark.parametrize("codes", [np.zeros((1, 4), np.int64), np.zeros(4, np.uint8)])
def test_codes_must_be_a_u8_matrix(codes):
    with pytest.raises(FormatError, match="must be uint8"):
        pack_codes(codes, 4)


def test_planes_of_another_size_are_refused():
    with pytest.raises(FormatError, match="do not hold 9 codes of 4 bits"):
        unpack_codes([np.zeros((2, 1), np.uint32)], 4, 9)
