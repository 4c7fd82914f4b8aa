"""Numbers in the golden files of version 1.1 against exact arithmetic, each operation rounded as SPEC 7.6.2 says."""

from fractions import Fraction

import independent_reader
import numpy as np
import pytest
from golden_samples import FOLDER

from formats.encoding import Codebook, Int8Rows, Trellis, Uniform
from formats.layer import dynamic_map
from formats.layer.codebook import level_table
from formats.reader import QtmFile


def weights(file: str, tensor: str) -> np.ndarray:
    return independent_reader.read(FOLDER / f"{file}.qtm").tensors[tensor]


def part(file: str, tensor: str, name: str) -> bytes:
    with QtmFile.open(FOLDER / f"{file}.qtm") as opened:
        entry = opened.tensors[tensor]
        (found,) = [part for part in entry.encoding.parts(entry.shape) if part.name == name]
        return bytes(opened.section(entry)[found.offset_bytes : found.end_bytes])


def nearest(value: Fraction) -> Fraction:
    """The float32 nearest to a number that is neither huge nor tiny, ties to even."""
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent  # Python rounds ties to even


def exact(array: np.ndarray) -> list[Fraction]:
    return [Fraction(float(value)) for value in array.ravel()]


def test_nearest_is_what_float32_does():
    for value in (Fraction(1, 3), Fraction(-2, 7), Fraction(2**24 + 1), Fraction(2**25 + 6), Fraction(1, 10**6)):
        assert nearest(value) == Fraction(float(np.float32(float(value))))
    assert (nearest(Fraction(2**24 + 1)), nearest(Fraction(2**24 + 3))) == (2**24, 2**24 + 4)


def test_spec_7_9_1_two_levels_by_hand():
    """Scales and zeros are both s * (code - z): s is 2047/1024, z 1365/4096, in the second group both negative."""
    assert part("two_level", "rounded", "scale_codes.2") == bytes([0b11100100, 0, 0, 0])  # 0 1 2 3
    assert part("two_level", "rounded", "zero_scales") == bytes.fromhex("ff3fffbf")
    s, z = Fraction(2047, 1024), Fraction(1365, 4096)
    statistics = [[(s, z, 0), (-s, -z, 1)], [(s, z, 2), (-s, -z, 3)]]
    want = []
    for row in statistics:
        for group, (scale, zero, code) in enumerate(row):
            statistic = nearest(scale * nearest(code - zero))
            want += [nearest(statistic * nearest(weight - statistic)) for weight in (2 * group, 2 * group + 1)]
    got = exact(weights("two_level", "rounded"))
    assert got == want
    unrounded = [statistic * (k - statistic) for k, statistic in enumerate([-s * z, -s * z])]
    assert got[:2] != unrounded  # so that the roundings are in it


def test_spec_7_10_2_sums_with_outliers_by_hand():
    got = weights("outliers", "rounded")
    assert got[0].tolist() == [-8319007.5, -8384512.0, 8319008.0, 0.0]  # -127 * 65504 + 0.33325...: to half a unit
    assert not np.signbit(got[0, 3])  # +0 + -0
    assert got[1, 0] == 0 and not np.signbit(got[1, 0])  # 2^-24 - 2^-24
    assert part("outliers", "rounded", "outlier_rows") == np.array([0, 3, 4], "<u4").tobytes()
    assert part("outliers", "rounded", "outlier_columns") == np.array([0, 2, 3, 0], "<u2").tobytes()


def test_spec_7_10_columns_of_32_bits_by_hand():
    assert part("outliers_wide", "65537", "outlier_columns") == np.array([65536], "<u4").tobytes()
    got = weights("outliers_wide", "65537")
    assert got[0, 65536] == np.float16(-11 / 16 + 0.1)  # code and zero are 0
    assert got[0, 65535] == 1 / 64  # code 7 * 65535 mod 4 = 1


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_spec_7_11_1_products_with_levels_by_hand(name):
    got = weights("codebook_tables", name)
    assert got[0].tolist() == level_table(name).tolist()  # the scale is 1, codes 0 to 15
    third = Fraction(1365, 4096)  # 0x3555
    assert exact(got[1]) == [nearest(third * level) for level in exact(level_table(name))]
    assert exact(got[2]) == [nearest(-65504 * level) for level in exact(level_table(name))]


def test_spec_7_11_2_nf4_by_what_is_known():
    """Rising, an exact zero, 7 levels below and 8 above; the outer ones are the quantiles' ends (arXiv 2305.14314)."""
    table = level_table("nf4")
    assert (np.diff(table) > 0).all() and table[7] == 0 and (table[0], table[15]) == (-1, 1)
    assert table[[1, 14]].tolist() == [np.float32(-0.6961928009986877), np.float32(0.7229568362236023)]


def test_spec_7_11_3_fp4_by_hand():
    """Sign, two bits of exponent and one of fraction, in twelfths of the largest: 0, 1/16, 8, 12, 4, 6, 2, 3."""
    table = level_table("fp4")
    assert exact(table[:8]) == [nearest(Fraction(k) / 12) for k in (0, Fraction(1, 16), 8, 12, 4, 6, 2, 3)]
    assert (table[9:] == -table[1:8]).all() and table[8] == 0 and not np.signbit(table[8])


def test_spec_7_12_2_the_dynamic_map_by_exact_arithmetic():
    """Midpoints of 2^i equal parts of [0.1, 1], times a power of ten, each rounded once."""
    want = {Fraction(0), Fraction(1)}
    for i in range(7):
        for j in range(2**i):
            low, part_of = Fraction(1, 10), Fraction(9, 10) / 2**i
            midpoint = (low + part_of * j + low + part_of * (j + 1)) / 2
            want |= {sign * nearest(midpoint / 10 ** (6 - i)) for sign in (1, -1)}
    table = dynamic_map()
    assert table.dtype == np.float32 and len(table) == 256
    assert exact(table) == sorted(want)
    assert table[-2] == -table[0] == np.float32(0.99296875)


def test_spec_7_12_1_a_scale_by_hand():
    """absmax 1, mean 1/3: product and sum are rounded one after the other; the codes of the weights are 0, 7, 14, 5."""
    assert part("double_quant", "absmax=1", "scale_codes")[:3] == b"\0\1\2"
    mean = Fraction(float(np.float32(1 / 3)))
    scales = [nearest(nearest(Fraction(float(entry))) + mean) for entry in dynamic_map()[:4]]
    levels = exact(level_table("nf4")[[0, 7, 14, 5]])
    got = exact(weights("double_quant", "absmax=1")[0, :4])
    assert got == [nearest(scale * level) for scale, level in zip(scales, levels, strict=True)]


def test_spec_7_13_1_int8_rows_by_hand():
    got = weights("int8_rows", "columns=2,7")
    assert part("int8_rows", "columns=2,7", "columns") == np.array([2, 7], "<u4").tobytes()
    assert part("int8_rows", "columns=2,7", "codes")[:4] == bytes([0x81, 0x9E, 0, 0xD8])  # -127, -98, apart, -40
    scale = Fraction(float(np.float32(1) / np.float32(127)))
    assert exact(got[0, :4])[:2] == [nearest(-127 * scale), nearest(-98 * scale)]
    assert got[0, 2] == np.float16(-11 / 16 + 0.5) and got[0, 7] == np.float16(-8 / 16 + 0.5)


def test_spec_7_14_2_subsets_by_hand():
    """Memory 2: z0 = x(t) + x(t - 2) from H0 = 5, z1 = x(t - 1) from H1 = 2; the subset is z1 + 2 z0.

    Columns 110, 011, 001 ... of `paths`, read down: 100, 110, 011, 001, 111.
    """
    got = sum(subset * weights("trellis", f"subset {subset}") for subset in range(4))
    assert got.T.tolist() == [[2, 1, 2], [2, 3, 3], [0, 2, 3], [0, 0, 2], [2, 3, 1]]


def test_spec_7_14_parts_by_hand():
    """70 x 9, 2 bits: three words of path an input, then three of the other bit."""
    with QtmFile.open(FOLDER / "trellis.qtm") as file:
        entry = file.tensors["bits=2.memory=3"]
        layer = file.layer(entry.name)
    parts = {found.name: found.shape for found in entry.encoding.parts(entry.shape)}
    assert parts == {"path.1": (9, 2), "codes.1": (9, 2), "scales": (64, 3), "levels": (8,)}
    column = layer.codes[:, 1]
    for name, bit in (("path.1", 0), ("codes.1", 1)):
        words = np.frombuffer(part("trellis", entry.name, name), "<u4").reshape(9, 2)
        bits = [int(words[1, r // 32]) >> (r % 32) & 1 for r in range(64)]
        assert bits == (column >> bit & 1).tolist()


def test_v1_1_reads_as_it_was_written():
    with QtmFile.open(FOLDER / "v1_1.qtm") as file:
        assert file.version == (1, 1)
        encodings = {name: entry.encoding for name, entry in file.tensors.items()}
    assert encodings["two levels"] == Uniform(bits=3, group_size=4, symmetric=False, stat_bits=3, stat_rows=2)
    assert encodings["outliers, input scales"] == Uniform(
        bits=4, group_size=4, symmetric=False, input_scales=True, outliers=14
    )
    assert encodings["fitted, 3 bits, double quantization"] == Codebook(
        bits=3, group_size=4, levels="fitted", double_quant=True
    )
    assert encodings["int8, two columns"] == Int8Rows(columns=2)
    assert encodings["trellis"] == Trellis(bits=3, memory=3, run=32, group_size=4)
    assert encodings["1.0"] == Uniform(bits=3, group_size=4, symmetric=False)
