"""Golden files: the bytes of every version, for ever (SPEC 2.3.5)."""

import os
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from both_readers import assert_same, read_with_formats
from format_samples import MEMBERS, make_layer, same_layer
from golden_samples import BF16_BITS, CONTENTS, F16_BITS, F32_BITS, FOLDER, write_golden

from formats.encoding import (
    ENCODINGS,
    MAX_BITS,
    MIN_BITS,
    Affine,
    Codebook,
    Int8Rows,
    TernaryDict,
    TernaryRans,
    Trellis,
    Uniform,
)
from formats.reader import QtmFile, verify
from formats.tensors import decode_tensor

MAX_BYTES = 18000
V1 = FOLDER / "v1.qtm"


def golden(name: str) -> Path:
    return FOLDER / f"{name}.qtm"


def first_difference(got: bytes, want: bytes) -> str:
    """The section of the golden file in which the first differing byte lies."""
    pairs = zip(got, want, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(want)))
    sections = QtmFile(want, "golden").header.sections()
    inside = [s.label for s in sections if s.offset_bytes <= at < s.offset_bytes + s.n_bytes]
    return f"byte {at}, in {inside[0] if inside else 'preamble, padding or header'}"


def section_hex(file: QtmFile, name: str, start: int, n_bytes: int) -> str:
    return bytes(file.section(file.tensors[name])[start : start + n_bytes]).hex(" ")


@pytest.mark.parametrize("name", CONTENTS)
def test_spec_2_3_5_the_writer_still_gives_these_bytes(name, tmp_path):
    """A byte changes only with SPEC.md and its version; QTOOL_WRITE_GOLDEN=1 writes a file that is not there yet."""
    got = write_golden(name, tmp_path / "a.qtm")
    if os.environ.get("QTOOL_WRITE_GOLDEN") and not golden(name).exists():
        golden(name).write_bytes(got)
    want = golden(name).read_bytes()
    assert got == want, f"differs from {name}.qtm: {first_difference(got, want)}"


def test_the_folder_holds_what_is_tested_and_stays_small():
    assert {path.stem for path in FOLDER.iterdir()} == set(CONTENTS)
    assert max(path.stat().st_size for path in FOLDER.iterdir()) < MAX_BYTES


@pytest.mark.parametrize("name", CONTENTS)
def test_both_readers_decode_it_to_the_same_bits(name):
    verify(golden(name))
    assert_same(read_with_formats(golden(name).read_bytes()), independent_reader.read(golden(name)))


@pytest.mark.parametrize("name", CONTENTS)
def test_the_loader_decodes_it_to_the_same_bits_in_the_models_orientation(name):
    want = independent_reader.read(golden(name)).tensors
    with QtmFile.open(golden(name)) as file:
        for entry in file.tensors.values():
            values = want[entry.name].T if entry.transposed else want[entry.name]
            assert decode_tensor(file, entry).numpy().tobytes() == values.tobytes(), entry.name


def test_every_encoding_and_option_is_in_some_golden_file():
    """So that nothing is added without a golden file."""
    entries = []
    for path in FOLDER.iterdir():
        with QtmFile.open(path) as file:
            entries += file.header.tensors
    assert {entry.encoding.name for entry in entries} == set(ENCODINGS)
    uniform = [entry.encoding for entry in entries if isinstance(entry.encoding, Uniform)]
    assert {(e.bits, e.symmetric, e.input_scales) for e in uniform} == {
        (bits, symmetric, scaled)
        for bits in range(MIN_BITS, MAX_BITS + 1)
        for symmetric in (False, True)
        for scaled in (False, True)
    }
    assert {(e.stat_bits, e.symmetric) for e in uniform} == {
        (bits, symmetric) for bits in (0, *range(MIN_BITS, MAX_BITS + 1)) for symmetric in (False, True)
    }
    codebook = [entry.encoding for entry in entries if isinstance(entry.encoding, Codebook)]
    assert {(e.levels, e.bits) for e in codebook} == {("nf4", 4), ("fp4", 4)} | {
        ("fitted", bits) for bits in range(MIN_BITS, MAX_BITS + 1)
    }
    assert {(e.levels, e.stat_bits > 0, e.double_quant) for e in codebook} == {
        (levels, two_level, double)
        for levels in ("nf4", "fp4", "fitted")
        for two_level, double in ((False, False), (True, False), (False, True))
    }
    trellis = [entry.encoding for entry in entries if isinstance(entry.encoding, Trellis)]
    assert {e.bits for e in trellis} == set(range(1, 7)) and {e.memory for e in trellis} == set(range(2, 10))
    for grouped in (uniform, codebook):
        assert {(e.outliers > 0, e.stat_bits > 0, e.input_scales) for e in grouped} >= {
            *((True, False, False), (True, False, True), (True, True, False), (True, True, True))
        }
    assert {e.encoding.columns for e in entries if isinstance(e.encoding, Int8Rows)} >= {0, 1, 2, 11}
    assert {(e.outliers > 0, e.stat_bits > 0, e.input_scales) for e in trellis} >= {
        *((False, True, False), (True, False, False), (True, True, True), (False, False, True))
    }
    ternary = [entry.encoding for entry in entries if isinstance(entry.encoding, TernaryDict | TernaryRans)]
    assert {(type(e), e.input_scales) for e in ternary} == {
        (kind, scaled) for kind in (TernaryDict, TernaryRans) for scaled in (False, True)
    }
    assert {e.words > 0 for e in ternary if isinstance(e, TernaryRans)} == {False, True}
    affine = [entry.encoding for entry in entries if isinstance(entry.encoding, Affine)]
    assert {(e.bits, e.stat_bits > 0, e.symmetric) for e in affine} >= {
        (bits, *levels)
        for bits in range(MIN_BITS, MAX_BITS + 1)
        for levels in ((False, False), (True, False), (True, True))
    }
    assert {e.stat_bits for e in affine} == {0, *range(MIN_BITS, MAX_BITS + 1)}
    dense = [entry for entry in entries if entry.encoding.name == "dense"]
    assert {entry.encoding.dtype for entry in dense} == {"F16", "BF16", "F32"}
    assert {len(entry.shape) for entry in dense} >= {0, 1, 2, 3, 8}
    assert {entry.transposed for entry in entries} == {False, True}
    assert {entry.relative_error for entry in entries} >= {None, 0.0}


def test_first_difference_names_the_section():
    want = V1.read_bytes()
    with QtmFile.open(V1) as file:
        at = file.tensors["bias"].offset_bytes
    changed = want[:at] + bytes([want[at] ^ 1]) + want[at + 1 :]
    assert first_difference(changed, want) == f"byte {at}, in tensor 'bias'"


def test_v1_reads_as_it_was_written():
    assert verify(V1).n_sections == 13
    with QtmFile.open(V1) as file:
        assert file.version == (1, 0)
        for bits in range(2, 9):
            entry = file.tensors[f"blocks.{bits}.weight"]
            assert entry.encoding == Uniform(
                bits=bits, group_size=32, symmetric=bits % 2 == 0, input_scales=bits in (3, 4)
            )
            assert (entry.transposed, entry.relative_error) == (bits == 8, bits / 64)
            assert same_layer(file.layer(entry.name), make_layer(5, 70, bits, 32, bits % 2 == 0, scaled=bits in (3, 4)))
        values = np.arange(12, dtype=np.float32)
        assert np.array_equal(file.dense("norm"), values.reshape(2, 3, 2))
        assert np.array_equal(file.dense("embed"), values.reshape(6, 2))
        assert np.array_equal(file.dense("bias"), values)
        assert file.dense("scalar") == 0.5
        assert file.read_file("tokenizer.json").decode() == '{"é":1}'
        assert file.read_file("empty.txt") == b""
        assert dict(file.header.model) == MEMBERS["model"]
        assert dict(file.header.quality) == {"perplexity": 5.25}


def test_spec_7_2_1_dense_values_by_hand():
    """-0, subnormals, infinities and NaN come out as they went in."""
    tensors = independent_reader.read(golden("dense")).tensors
    assert tensors["f32"].view(np.uint32).tolist() == F32_BITS
    assert tensors["bf16"].view(np.uint32).ravel().tolist() == [bits << 16 for bits in BF16_BITS]
    # f16: 1 sign, 5 exponent (bias 15), 10 fraction bits; f32: 1, 8 (bias 127), 23.
    assert [F16_BITS[i] for i in (1, 2, 3, 5, 9)] == [0x8000, 0x0001, 0x83FF, 0x3C00, 0x7E2A]
    f16 = tensors["f16"]
    assert np.signbit(f16[1]) and f16[1] == 0
    assert f16[2] == 2**-24  # fraction 1 of 2^-10, at the exponent of subnormals, -14
    assert f16[3] == -1023 * 2**-24
    assert f16[5] == 1.0  # exponent 15 - 15
    assert f16[9:10].view(np.uint32) == 0x7FC54000  # 0x22a << 13 behind an exponent of ones
    assert tensors["scalar"] == 3.140625  # 0x4049, the upper half of pi's 0x40490fdb: 2 * (1 + 0x49 / 128)
    assert tensors["scalar"].shape == ()


def test_spec_7_5_an_asymmetric_weight_of_three_bits_by_hand():
    name = "symmetric=0.input_scales=0"
    # 37 codes a row: at 0 three rows of ceil(74 / 32) words of plane 2, at 64 of ceil(37 / 32) words of plane 1, at 128
    # 3 x 3 scales, at 192 and 256 the planes of 9 zeros.
    with QtmFile.open(golden("uniform_3bit")) as file:
        # Lowest bits first: 0x6c is 0 3 2 1, 0x1e is 0 1 1 1 1 0 0 0; codes, low + 4 * high: 0 7 6 5 4 3 2 1.
        assert section_hex(file, name, 0, 2) == "6c 6c"
        assert section_hex(file, name, 64, 1) == "1e"
        assert section_hex(file, name, 128, 4) == "00 24 00 28"  # 2^-6 and 2^-5
        # 0xe4 is 0 1 2 3, 0x5a is 0 1 0 1: the zeros of row 0 are 0, 5 and 2.
        assert (section_hex(file, name, 192, 1), section_hex(file, name, 256, 1)) == ("e4", "5a")
    weights = independent_reader.read(golden("uniform_3bit")).tensors[name]
    assert (64 * weights[0, :8]).tolist() == [0, 7, 6, 5, 4, 3, 2, 1]
    assert (32 * weights[0, 16:24]).tolist() == [-5, 2, 1, 0, -1, -2, -3, -4]  # the same codes, less 5


def test_spec_7_7_a_symmetric_weight_of_eight_bits_by_hand():
    name = "symmetric=1.input_scales=1"
    with QtmFile.open(golden("uniform_8bit")) as file:
        assert section_hex(file, name, 0, 4) == "00 07 0e 15"
        assert section_hex(file, name, 128, 2) == "00 24"  # 2^-6
        assert section_hex(file, name, 192, 8) == "00 36 00 38 00 39 00 3a"  # 3/8, 4/8, 5/8, 6/8
    weights = independent_reader.read(golden("uniform_8bit")).tensors[name]
    assert weights[0, :4].tolist() == [-128 * 3 / 512, -121 * 4 / 512, -114 * 5 / 512, -107 * 6 / 512]


def test_spec_7_5_2_the_sign_of_a_zero_by_hand():
    """code - 128 is -128, -1, +0, 1 and 127 in every row; signs multiply, also those of zeros."""
    signs = independent_reader.read(golden("uniform_values")).tensors["signs"]
    assert not signs[:2].any()
    assert np.signbit(signs[0]).tolist() == [True, True, False, False, False]  # scale +0
    assert np.signbit(signs[1]).tolist() == [False, False, True, True, True]  # scale -0
    assert (2.0**24 * signs[3]).tolist() == [128, 1, 0, -1, -127]  # scale -2^-24, a subnormal
    assert np.signbit(signs[3, 2])  # -2^-24 * +0


def test_spec_7_5_1_the_rounding_by_hand():
    """The products have more than 24 bits; scale 65504 = 2047 * 2^5, code - zero = -127."""
    rounded = independent_reader.read(golden("uniform_values")).tensors["rounded"]
    assert rounded[0, 0] == -8448992.0  # 127 * 2047 * 65 = 16897985, halved; a tie: to the even 8448992
    assert rounded[0, 1] == -8708962.0  # 127 * 2047 * 67 = 17417923, halved; a tie: to the even 8708962
    assert rounded[0, 2] == -2772325.75  # 127 * 2047 * 1365 = 354857685, to a multiple of 32: 354857696; over 2^7
    assert rounded[0, 3] == 2772325.75
    assert np.signbit(rounded[1, 5]) and rounded[1, 5] == 0  # scale -0.1, code = zero
