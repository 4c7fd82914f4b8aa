"""Every "must" of SPEC 7.6.1 and 7.9 to 7.17 broken: numbers in sections under right hashes, and fields of entries."""

from dataclasses import replace

import numpy as np
import pytest
from both_readers import both_read
from format_samples import NO_MEMBERS
from layer_samples import (
    LAYERS,
)
from test_hostile import with_section

from formats.encoding import (
    Affine,
    Codebook,
    Encoding,
    Int8Rows,
    TernaryDict,
    TernaryRans,
    Trellis,
    Uniform,
    encoding_from_fields,
    encoding_of,
)
from formats.errors import FormatError
from formats.layer import TrellisLinear
from formats.reader import QtmFile, verify
from formats.section import pack, part_arrays
from formats.tensors import decode_tensor
from formats.writer import Writer

NAN, INFINITE = np.float16(np.nan), np.float32(-np.inf)
BEYOND = np.nextafter(np.float32(2.0**64), np.float32(np.inf))
ENDS = r"outlier_rows go from \d+ to \d+: must be from 0 to 8 \(SPEC 7.10.1\)"
FALL = r"outlier_rows fall behind row 1: must never fall \(SPEC 7.10.1\)"
RISE = r"outlier_columns do not rise at outlier 1: must within a row \(SPEC 7.10.1\)"
BLOCKS = "ternary by rANS, two blocks, input scales"
COLUMN = r"outlier_columns reach \d+: must be below 11 inputs \(SPEC 7.10.1\)"


@pytest.mark.parametrize(
    ("name", "part", "at", "value", "message"),
    [
        ("two levels", "scale_scales", (1, 2), NAN, r"a scale of the scales is NaN or infinite \(SPEC 7.6\)"),
        ("two levels", "scale_zeros", (0, 0), INFINITE, r"a zero of the scales is NaN or infinite \(SPEC 7.6\)"),
        ("two levels", "zero_scales", (2, 0), NAN, r"a scale of the zeros is NaN or infinite \(SPEC 7.6\)"),
        ("two levels", "zero_zeros", (0, 1), INFINITE, r"a zero of the zeros is NaN or infinite \(SPEC 7.6\)"),
        (
            "two levels, symmetric, input scales",
            "input_scales",
            (3,),
            0,
            "an input scale is NaN, infinite or not above",
        ),
        ("outliers", "outlier_values", (7,), NAN, r"an outlier is NaN or infinite \(SPEC 7.6\)"),
        ("outliers", "outlier_rows", (0,), 1, ENDS),
        ("outliers", "outlier_rows", (0,), 2**32 - 1, ENDS),
        ("outliers", "outlier_rows", (4,), 7, ENDS),
        ("outliers", "outlier_rows", (4,), 2**32 - 1, ENDS),
        ("outliers", "outlier_rows", (2,), 1, FALL),
        ("outliers", "outlier_rows", (1,), 2**32 - 1, FALL),
        ("outliers", "outlier_columns", (1,), 4, RISE),
        ("outliers", "outlier_columns", (1,), 3, RISE),
        ("outliers", "outlier_columns", (7,), 11, COLUMN),
        ("outliers", "outlier_columns", (1,), 65535, COLUMN),
        ("fitted, 3 bits, double quantization", "levels", (5,), NAN, r"a level is NaN or infinite \(SPEC 7.6\)"),
        ("nf4", "scales", (1, 1), INFINITE, r"a scale is NaN or infinite \(SPEC 7.6\)"),
        (
            "nf4, double quantization",
            "scale_absmax",
            (1,),
            np.nan,
            r"an absmax of the scales is NaN, infinite or beyond",
        ),
        ("nf4, double quantization", "scale_absmax", (1,), INFINITE, r"an absmax of .* beyond 2\*\*64 \(SPEC 7.6\)"),
        ("nf4, double quantization", "scale_mean", (0,), -BEYOND, r"the mean of the scales is .* beyond 2\*\*64"),
        ("fp4, input scales", "input_scales", (2,), -1, r"an input scale is NaN, infinite or not above 0 \(SPEC 7.6\)"),
        ("trellis", "levels", (15,), NAN, r"a level is NaN or infinite \(SPEC 7.6\)"),
        ("trellis", "scales", (69, 2), INFINITE, r"a scale is NaN or infinite \(SPEC 7.6\)"),
        ("ternary", "scales", (4, 1), NAN, r"a scale is NaN or infinite \(SPEC 7.6\)"),
        ("ternary, input scales", "input_scales", (69,), 0, "an input scale is NaN, infinite or not above 0"),
        ("ternary", "codeword_rows", (0,), 1, r"codeword_rows go from 1 to 35: must be from 0 to 35 \(SPEC 7.15.4\)"),
        ("ternary", "codeword_rows", (5,), 36, "codeword_rows go from 0 to 36: must be from 0 to 35"),
        ("ternary", "codeword_rows", (5,), 2**32 - 1, "codeword_rows go from 0 to 4294967295: must be"),
        ("ternary", "codeword_rows", (2,), 1, r"codeword_rows fall behind number 1: must never .*\(SPEC 7.15.4\)"),
        ("ternary", "codeword_rows", (3,), 2**32 - 1, "codeword_rows fall behind number 3: must never fall"),
        ("ternary", "codeword_rows", (1,), 5, r"codewords of row 0 hold \d+ pairs: must be 36 \(SPEC 7.15.4\)"),
        ("ternary", "codewords", (0,), 65535, r"codewords of row 0 hold \d+ pairs: must be 36 \(SPEC 7.15.4\)"),
        ("ternary", "codewords", (29,), 0, r"codewords of row 4 hold \d+ pairs: must be 36 \(SPEC 7.15.4\)"),
        ("ternary by rANS", "frequencies", (0,), 0, r"frequencies add up to \d+: must be 16384 \(SPEC 7.16.2\)"),
        ("ternary by rANS", "frequencies", (242,), 65535, "frequencies add up to 81919: must be 16384"),
        ("ternary by rANS", "states", (4, 0), 65535, r"a state is 65535: must be 65536 or more \(SPEC 7.16.3\)"),
        ("ternary by rANS", "states", (0, 0), 0, "a state is 0: must be 65536 or more"),
        ("ternary by rANS", "states", (2, 0), 2**32 - 1, r"(words of block 0: .*|.* end at 65536) \(SPEC 7.16.4\)"),
        ("ternary by rANS", "words", (16,), 77, r"a state of block 0 does not end at 65536 \(SPEC 7.16.4\)"),
        ("ternary by rANS", "word_blocks", (0,), 2, r"word_blocks go from 2 to 17: must be from 0 to 17 \(SPEC 7.16.3"),
        (BLOCKS, "word_blocks", (1,), 160, r"word_blocks fall behind number 1: must never fall \(SPEC 7.16.3\)"),
        (BLOCKS, "word_blocks", (1,), 3, r"words of block 0: its lanes take more, or fewer, .*\(SPEC 7.16.4\)"),
        ("affine", "scales", (4, 2), NAN, r"a scale is NaN or infinite \(SPEC 7.6\)"),
        ("affine", "minima", (0, 9), INFINITE, r"a minimum is NaN or infinite \(SPEC 7.6\)"),
        ("affine, two levels", "scale_units", (4, 1), INFINITE, r"a unit of the scales is NaN or .*\(SPEC 7.6\)"),
        ("affine, two levels", "minimum_units", (0, 0), NAN, r"a unit of the minima is NaN or .*\(SPEC 7.6\)"),
        ("order of the inputs", "input_order", (3,), 0, r"input_order has no 15: must have each number .*\(SPEC 7.8\)"),
        ("order of the inputs", "input_order", (0,), 37, r"input_order has no 0: must have each .*\(SPEC 7.8\)"),
        ("order of the inputs, all", "input_order", (1,), 2**32 - 1, r"input_order has no 5: .*\(SPEC 7.8\)"),
        ("int8", "scales", (0,), BEYOND, r"a scale is NaN, infinite or beyond 2\*\*64 \(SPEC 7.6\)"),
        ("int8", "codes", (2, 10), -128, r"a code is -128: must be -127 to 127 \(SPEC 7.13.2\)"),
        ("int8, two columns", "values", (0, 1), NAN, r"a value is NaN or infinite \(SPEC 7.6\)"),
        (
            "int8, two columns",
            "columns",
            (1,),
            2,
            r"columns do not rise: must, and none may stand twice \(SPEC 7.13.2\)",
        ),
        ("int8, two columns", "columns", (1,), 0, "columns do not rise"),
        ("int8, two columns", "columns", (1,), 11, r"columns reach 11: must be below 11 inputs \(SPEC 7.13.2\)"),
        ("int8, two columns", "columns", (1,), 2**32 - 1, "columns reach 4294967295: must be below 11 inputs"),
        ("int8, two columns", "codes", (0, 7), 1, r"a code of an input in columns is not 0: .*\(SPEC 7.13.2\)"),
    ],
)
def test_spec_7_6_1_numbers_that_cannot_be_are_found_by_whoever_decodes(name, part, at, value, message, tmp_path):
    """verify, the numpy decoder and the loader's: each before it uses the number; and the second reader."""
    layer = LAYERS[name]
    section = bytearray(pack(layer))
    part_arrays(section, layer.shape, encoding_of(layer))[part][at] = value
    path = with_section(tmp_path / "a.qtm", layer, bytes(section))
    assert not both_read(path.read_bytes())
    with QtmFile.open(path) as file:
        for read in (lambda: verify(path), lambda: file.layer("w"), lambda: decode_tensor(file, file.tensors["w"])):
            with pytest.raises(FormatError, match=f"a.qtm: tensor 'w': {message}"):
                read()


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("ternary", "codewords", r"codewords of row 4: a value behind the last is not 0 \(SPEC 7.15.5\)"),
        ("ternary by rANS", "words", r"the last symbol of row 4: a value behind the last is not 0 \(SPEC 7.16.5\)"),
    ],
)
def test_spec_7_15_5_values_behind_the_last(name, part, message, tmp_path):
    """The streams of a matrix with one input more, whose last value is not zero, as those of the matrix."""
    layer = LAYERS[name]
    codes = np.concatenate([layer.codes, np.zeros((5, 1), np.int8)], axis=1)
    codes[4, -1] = 1
    wider = replace(layer, codes=codes)
    encoding, arrays = encoding_of(wider), wider.encoding.pack(wider)
    section = bytearray(encoding.section_bytes(layer.shape))
    for found, array in part_arrays(section, layer.shape, encoding).items():
        array[...] = arrays[found]
    path = tmp_path / "a.qtm"
    with Writer(path) as writer:
        writer.add_tensor("w", layer.shape, encoding, bytes(section))
        writer.finish(**NO_MEMBERS)
    with pytest.raises(FormatError, match=f"tensor 'w': {message}"):
        verify(path)
    assert not both_read(path.read_bytes())
    with QtmFile.open(path) as file:  # nothing that is read says so
        assert np.array_equal(file.layer("w").codes, layer.codes)


@pytest.mark.parametrize("name", LAYERS)
def test_spec_7_4_4_no_bit_of_a_section_is_free(name, tmp_path):
    """Set one that no part uses: behind the last field of a plane, or between two parts (SPEC 4.3)."""
    layer = LAYERS[name]
    section = np.frombuffer(pack(layer), np.uint8)
    free = unused(layer)
    assert free.any()
    bytes_with_some = np.flatnonzero(free)
    for byte in bytes_with_some[:: -(-len(bytes_with_some) // 40)]:
        spoilt = section.copy()
        spoilt[byte] |= free[byte] & -free[byte].astype(np.int16)  # the lowest one
        path = with_section(tmp_path / f"{byte}.qtm", layer, spoilt.tobytes())
        with pytest.raises(FormatError, match=r"tensor 'w': .* not zero \(SPEC (4.3|7.4.4)\)"):
            verify(path)
        assert not both_read(path.read_bytes())


def unused(layer) -> np.ndarray:
    """The bits of a section, byte by byte, that hold nothing: all but those that some layer of this kind could set."""
    encoding = encoding_of(layer)
    used = bytearray(encoding.section_bytes(layer.shape))
    for array in part_arrays(used, layer.shape, encoding).values():
        array.view(np.uint8)[...] = 0xFF
    for name, words in part_arrays(used, layer.shape, encoding).items():
        field, dot, width = name.partition(".")
        if dot:
            n = fields_in_a_row(layer, field)
            bits = np.zeros((words.shape[0], 32 * words.shape[1]), np.uint8)
            bits[:, : n * int(width)] = 1
            words[...] = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    return ~np.frombuffer(bytes(used), np.uint8)


def fields_in_a_row(layer, field: str) -> int:
    if isinstance(layer, TrellisLinear):
        in_a_row = {"path": layer.out_features, "codes": layer.out_features}
    else:
        in_a_row = {"codes": layer.in_features}
    return in_a_row.get(field, layer.out_features * -(-layer.in_features // layer.group_size))


UNIFORM = {"encoding": "uniform", "bits": 3, "group_size": 4, "symmetric": False}
TRELLIS = {"encoding": "trellis", "bits": 2, "memory": 4, "run": 64, "group_size": 4}
DICTIONARY = {"encoding": "ternary_dict", "share_low": 20, "share_high": 20, "codewords": 9}
RANS = {"encoding": "ternary_rans", "segment": 20, "words": 2}
AFFINE = {"encoding": "affine", "bits": 4, "group_size": 4, "symmetric": False}
CODEBOOK = {"encoding": "codebook", "bits": 4, "group_size": 4, "levels": "nf4"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (UNIFORM | {"stat_bits": 1, "stat_rows": 2}, r"stat_bits=1: must be 0 or 2 to 8 \(SPEC 7.9\)"),
        (UNIFORM | {"stat_bits": 9, "stat_rows": 2}, r"stat_bits=9: must be 0 or 2 to 8 \(SPEC 7.9\)"),
        (UNIFORM | {"stat_bits": -3, "stat_rows": 2}, r"stat_bits is -3: must be an integer from 0 to 2\*\*63 - 1"),
        (UNIFORM | {"stat_bits": 3}, r"stat_rows=0: must be 1 or more with stat_bits \(SPEC 7.9\)"),
        (UNIFORM | {"stat_bits": 3, "stat_rows": 2**63}, r"stat_rows is 9223372036854775808: must be .*\(SPEC 3.3\)"),
        (UNIFORM | {"stat_rows": 3}, r"stat_rows=3: must be 0 without stat_bits \(SPEC 7.9\)"),
        (UNIFORM | {"stat_bits": True, "stat_rows": 2}, r"stat_bits=True: must be int \(SPEC 5.1\)"),
        (UNIFORM | {"outliers": 34}, r"outliers=34: must be 0 to 3x11 \(SPEC 7.10\)"),
        (UNIFORM | {"outliers": 2**63 - 1}, r"outliers=9223372036854775807: must be 0 to 3x11 \(SPEC 7.10\)"),
        (UNIFORM | {"outliers": None}, "outliers=None: must be int"),
        (CODEBOOK | {"levels": "af4"}, r"levels='af4': must be nf4, fp4 or fitted \(SPEC 7.11\)"),
        (CODEBOOK | {"levels": ["nf4"]}, r"levels=\['nf4'\]: must be str"),
        (CODEBOOK | {"bits": 3}, r"bits=3: must be 4 with levels nf4 \(SPEC 7.11\)"),
        (CODEBOOK | {"bits": 5, "levels": "fp4"}, r"bits=5: must be 4 with levels fp4 \(SPEC 7.11\)"),
        (CODEBOOK | {"bits": 9, "levels": "fitted"}, r"bits=9: must be 2 to 8 \(SPEC 7.3, 7.14\)"),
        (CODEBOOK | {"double_quant": 1}, "double_quant=1: must be bool"),
        (CODEBOOK | {"double_quant": True, "stat_bits": 3, "stat_rows": 1}, r"double_quant=True: .*\(SPEC 7.12\)"),
        (CODEBOOK | {"group_size": 12}, r"group_size=12: more than 11 inputs \(SPEC 7.3\)"),
        (TRELLIS | {"bits": 0}, r"bits=0: must be 1 to 6 \(SPEC 7.3, 7.14\)"),
        (TRELLIS | {"bits": 7}, r"bits=7: must be 1 to 6 \(SPEC 7.3, 7.14\)"),
        (TRELLIS | {"memory": 1}, r"memory=1: must be 2 to 9 \(SPEC 7.14\)"),
        (TRELLIS | {"memory": 10}, r"memory=10: must be 2 to 9 \(SPEC 7.14\)"),
        (TRELLIS | {"run": 0}, r"run=0: must be a multiple of 32, above 0 \(SPEC 7.14\)"),
        (TRELLIS | {"run": 2**63}, r"run is 9223372036854775808: must be an integer from 0 to .*\(SPEC 3.3\)"),
        (TRELLIS | {"run": 48}, r"run=48: must be a multiple of 32, above 0 \(SPEC 7.14\)"),
        (TRELLIS | {"run": 32.0}, "run=32.0: must be int"),
        (DICTIONARY | {"share_low": 0}, r"share_low=0, share_high=20: must each be 1 or more, .* 255 \(SPEC 7.15\)"),
        (DICTIONARY | {"share_high": 0}, "share_low=20, share_high=0: must each be 1 or more"),
        (DICTIONARY | {"share_low": 236}, "share_low=236, share_high=20: must each be 1 or more, together at most 255"),
        (DICTIONARY | {"share_low": 10**30}, "share_low is 1000000000000000000000000000000: must be an integer"),
        (DICTIONARY | {"share_low": 0.5}, "share_low=0.5: must be int"),
        (DICTIONARY | {"codewords": 2}, r"codewords=2: must be 3 to 18 \(SPEC 7.15\)"),
        (DICTIONARY | {"codewords": 19}, r"codewords=19: must be 3 to 18 \(SPEC 7.15\)"),
        (DICTIONARY | {"codewords": 2**63 - 1}, r"codewords=9223372036854775807: must be 3 to 18 \(SPEC 7.15\)"),
        (RANS | {"segment": 0}, r"segment=0: must be a multiple of 10, above 0 \(SPEC 7.16\)"),
        (RANS | {"segment": 15}, r"segment=15: must be a multiple of 10, above 0 \(SPEC 7.16\)"),
        (RANS | {"segment": 2**63}, r"segment is 9223372036854775808: must be an integer from 0 to .*\(SPEC 3.3\)"),
        (RANS | {"words": 10}, r"words=10: must be 0 to 9 \(SPEC 7.16\)"),
        (RANS | {"words": True}, "words=True: must be int"),
        (AFFINE | {"bits": 1}, r"bits=1: must be 2 to 8 \(SPEC 7.17\)"),
        (AFFINE | {"bits": 9}, r"bits=9: must be 2 to 8 \(SPEC 7.17\)"),
        (AFFINE | {"group_size": 0}, r"group_size=0: must be 1 or more \(SPEC 7.17\)"),
        (AFFINE | {"group_size": 12}, r"group_size=12: more than 11 inputs \(SPEC 7.17\)"),
        (AFFINE | {"stat_bits": 1, "stat_groups": 2}, r"stat_bits=1: must be 2 to 8 \(SPEC 7.17\)"),
        (AFFINE | {"stat_bits": 9, "stat_groups": 2}, r"stat_bits=9: must be 2 to 8 \(SPEC 7.17\)"),
        (AFFINE | {"stat_bits": 6}, r"stat_groups=0: must be 1 or more with stat_bits \(SPEC 7.17\)"),
        (AFFINE | {"stat_groups": 8}, r"stat_groups=8: must be 0 without stat_bits \(SPEC 7.17\)"),
        (AFFINE | {"stat_bits": 6, "stat_groups": 2**63}, r"stat_groups is 9223372036854775808: must be an integer"),
        (AFFINE | {"symmetric": True}, r"symmetric without stat_bits: that is uniform \(SPEC 7.17\)"),
        ({"encoding": "int8_rows", "columns": 12}, r"columns=12: must be 0 to 11 \(SPEC 7.13\)"),
        ({"encoding": "int8_rows", "columns": "2"}, "columns='2': must be int"),
    ],
)
def test_spec_7_9_fields_that_cannot_be_are_refused(entry, message):
    with pytest.raises(FormatError, match=message):
        encoding_from_fields(entry).parts((3, 11))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Uniform(bits=3, group_size=4, symmetric=True, stat_rows=-3),
            "stat_rows=-3: must be 0 without stat_bits",
        ),
        (
            lambda: Uniform(bits=3, group_size=4, symmetric=True, stat_bits=3, stat_rows=-1),
            "stat_rows=-1: must be 1 or",
        ),
        (
            lambda: Uniform(bits=3, group_size=4, symmetric=True, outliers=-1).parts((3, 11)),
            "outliers=-1: must be 0 to",
        ),
        (
            lambda: TernaryDict(share_low=-1, share_high=3, codewords=9),
            "share_low=-1, share_high=3: must each be 1 or more",
        ),
        (lambda: TernaryRans(segment=-10, words=0), "segment=-10: must be a multiple of 10, above 0"),
        (lambda: TernaryRans(segment=10, words=-1).parts((3, 11)), "words=-1: must be 0 to 9"),
        (lambda: Int8Rows(columns=-1).parts((3, 11)), r"columns=-1: must be 0 to 11 \(SPEC 7.13\)"),
        (lambda: Trellis(bits=2, memory=4, run=-32, group_size=4), "run=-32: must be a multiple of 32, above 0"),
    ],
)
def test_an_encoding_that_a_caller_cannot_mean(make, message):
    """What JSON cannot say (SPEC 3.3)."""
    with pytest.raises(FormatError, match=message):
        make()


def test_spec_7_10_more_outliers_than_a_pointer_counts():
    encoding = Uniform(bits=2, group_size=64, symmetric=True, outliers=2**32)
    with pytest.raises(FormatError, match=r"outliers=4294967296: must be at most 4294967295 \(SPEC 7.10\)"):
        encoding.parts((2**20, 2**20))
    assert replace(encoding, outliers=2**32 - 1).section_bytes((2**20, 2**20)) > 2**32


@pytest.mark.parametrize(
    "encoding",
    [
        Affine(bits=4, group_size=1, symmetric=False),
        Codebook(bits=4, group_size=1, levels="nf4"),
        Int8Rows(),
        Uniform(bits=2, group_size=1, symmetric=True),
        TernaryDict(share_low=1, share_high=1, codewords=1),
        TernaryRans(segment=10, words=1),
    ],
)
@pytest.mark.parametrize("shape", [(), (4,), (1, 2, 3)])
def test_spec_7_11_quantized_tensors_have_two_dimensions(encoding: Encoding, shape):
    with pytest.raises(FormatError, match=rf"{encoding.name} needs two dimensions \(SPEC 7.3, 7.11, 7.13 to 7.17\)"):
        encoding.parts(shape)
