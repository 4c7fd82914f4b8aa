"""What the golden files of version 1.1 hold."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from format_samples import MEMBERS, NO_MEMBERS, add_layer, f16, make_layer
from layer_samples import LAYERS, counting, make_codebook, make_int8, make_spqr, make_trellis, with_outliers

from formats.encoding import Dense
from formats.layer import (
    CodebookLinear,
    DoubleQuant,
    Int8Linear,
    QuantizedLinear,
    SparseOutliers,
    TrellisLinear,
    TwoLevel,
)
from formats.writer import Writer

IN_V1_1 = (
    *("two levels", "outliers, input scales", "nf4", "fp4, two levels and outliers"),
    *("fitted, 3 bits, double quantization", "int8, two columns", "trellis"),
)


def everything(writer: Writer) -> None:
    """Every encoding that 1.1 brought, beside what was there."""
    for name in IN_V1_1:
        add_layer(writer, name, LAYERS[name], transposed=name == "nf4", relative_error=0.125 if "," in name else None)
    add_layer(writer, "1.0", make_layer())
    writer.add_tensor("norm", (3,), Dense("F16"), np.array([1, 2, 3], "<f2"))
    writer.add_file("tokenizer.json", b"{}")
    writer.finish(**MEMBERS)


def two_level(writer: Writer) -> None:
    """Statistics of every number of bits; sets of one row, of several with a short last one, of more than there are."""
    for stat_bits in range(2, 9):
        for symmetric in (False, True):
            layer = make_spqr(5, 37, 3, 16, symmetric, stat_bits, stat_rows=stat_bits - 1)
            add_layer(writer, f"stat_bits={stat_bits}.symmetric={symmetric:d}", layer)
    # Scales (2047 - 2^-10) / 2^10 times a code less 1/3, and zeros of that kind: every operation rounds.
    codes = np.arange(4, dtype=np.uint8).reshape(2, 2)
    scales, zeros = f16([0x3FFF, 0xBFFF]).reshape(1, 2), f16([0x3555, 0xB555]).reshape(1, 2)
    statistic = TwoLevel(codes=codes, scales=scales, zeros=zeros, bits=2, rows=2)
    weight = counting(2, 4, step=1, below=4)
    add_layer(
        writer,
        "rounded",
        QuantizedLinear(codes=weight, scales=statistic, zeros=statistic, bits=2, group_size=2),
    )
    writer.finish(**NO_MEMBERS)


def outliers(writer: Writer) -> None:
    """In every row and in few, in all encodings that have them, with sums that round, and with input scales."""
    for every in (1, 2, 5, 40):
        add_layer(writer, f"every={every}", with_outliers(make_layer(4, 11, 4), every))
    add_layer(writer, "two levels, input scales", with_outliers(make_spqr(scaled=True)))
    add_layer(writer, "two levels", with_outliers(make_spqr(symmetric=True)))
    add_layer(writer, "codebook, two levels", with_outliers(make_codebook(statistics="two_level")))
    add_layer(
        writer, "codebook, two levels, input scales", with_outliers(make_codebook(statistics="two_level", scaled=True))
    )
    add_layer(writer, "codebook", with_outliers(make_codebook(levels="fp4")))
    add_layer(writer, "codebook, input scales", with_outliers(make_codebook(scaled=True)))
    # 2047 * 2^5 * -127 has 18 bits; the sum with a number of 2^-24 or of 11 bits elsewhere rounds.
    large = QuantizedLinear(
        codes=np.array([[1, 0, 255, 128], [129, 0, 0, 0]], np.uint8),
        scales=f16([0x7BFF, 0x0001]).reshape(2, 1),
        zeros=None,
        bits=8,
        group_size=4,
        outliers=SparseOutliers(
            row_ptr=np.array([0, 3, 4], np.uint32),
            columns=np.array([0, 2, 3, 0], np.uint16),
            values=f16([0x3555, 0x0001, 0x8000, 0x8001]),
        ),
    )
    add_layer(writer, "rounded", large)
    writer.finish(**NO_MEMBERS)


def wide_outliers(writer: Writer) -> None:
    """More than 65536 inputs: columns of 32 bits; and exactly so many, which still takes 16."""
    add_layer(writer, "65537", with_outliers(make_layer(1, 65537, 2, 65537), every=65537))
    writer.finish(**NO_MEMBERS)


def codebook_tables(writer: Writer) -> None:
    """All levels of both tables with a scale of 1, of 1/3 and of -65504; every kind of statistic; input scales."""
    for levels in ("nf4", "fp4"):
        scales = f16([0x3C00, 0x3555, 0xFBFF]).reshape(3, 1)
        codes = np.tile(np.arange(16, dtype=np.uint8), (3, 1))
        add_layer(writer, levels, CodebookLinear(codes=codes, levels=levels, scales=scales, bits=4, group_size=16))
        for statistics in ("f16", "two_level", "double_quant"):
            for scaled in (False, True):
                layer = make_codebook(3, 37, 4, 16, levels, statistics, scaled)
                add_layer(writer, f"{levels}.{statistics}.input_scales={scaled:d}", layer)
    writer.finish(**NO_MEMBERS)


def codebook_fitted(writer: Writer) -> None:
    """Every number of bits, and every kind of statistic."""
    for bits in range(2, 9):
        add_layer(writer, f"{bits}", make_codebook(3, 37, bits, 16, "fitted", scaled=bits % 2 == 0))
    for statistics in ("two_level", "double_quant"):
        add_layer(writer, statistics, make_codebook(3, 37, 3, 16, "fitted", statistics))
    writer.finish(**NO_MEMBERS)


def double_quantization(writer: Writer) -> None:
    """Every entry of the map; blocks that end inside a row, one that is short; an absmax of either sign."""
    layer = make_codebook(1, 256, 4, 1, "nf4")
    for absmax in (1, -3, 2.0**64, 2.0**-140):
        scales = DoubleQuant(
            codes=np.arange(256, dtype=np.uint8).reshape(1, 256),
            absmax=np.array([absmax], np.float32),
            mean=np.array([absmax / 3], np.float32),
        )
        add_layer(writer, f"absmax={absmax:g}", replace(layer, scales=scales))
    add_layer(writer, "blocks", make_codebook(7, 45, 4, 1, "nf4", "double_quant"))
    writer.finish(**NO_MEMBERS)


def int8_rows(writer: Writer) -> None:
    """Without columns, with some, with all; scales of either sign and size; products that round."""
    for columns in ((), (0,), (2, 7), (10,), tuple(range(11))):
        add_layer(writer, f"columns={','.join(map(str, columns))}", make_int8(3, 11, columns))
    scales = np.array([1 / 3, -1e-40, 2.0**64, 0, -0.0], np.float32)
    codes = np.tile(np.array([-127, -1, 0, 1, 127], np.int8), (5, 1))
    add_layer(writer, "scales", Int8Linear(codes=codes, scales=scales), relative_error=0.5, transposed=True)
    writer.finish(**NO_MEMBERS)


def trellis(writer: Writer) -> None:
    """Every number of bits, every memory; sequences that end in a word, at one, and where the rows do."""
    for i, memory in enumerate(range(2, 10)):
        bits, rows, run = i % 6 + 1, (70, 64, 32, 5)[i % 4], (32, 64)[i % 2]
        add_layer(
            writer, f"bits={bits}.memory={memory}", make_trellis(rows, 9, bits, 4, memory, run, scaled=i % 3 == 0)
        )
    add_layer(writer, "two levels", make_trellis(70, 9, 2, 4, 5, statistics="two_level"))
    add_layer(writer, "outliers", with_outliers(make_trellis(70, 9, 2, 4, 5), every=50))
    every_setting = make_trellis(70, 9, 2, 4, 5, statistics="two_level", scaled=True)
    add_layer(writer, "everything", with_outliers(every_setting, every=50))
    # Every path of three bits and the one level of each subset that is not 0, in turn; the scale is 1.
    paths = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 0, 1], [0, 0, 1, 1, 1]], np.uint8)
    for subset in range(4):
        levels = np.zeros(4, np.float16)
        levels[subset] = 1
        layer = TrellisLinear(
            codes=paths, scales=np.ones((3, 1), np.float16), levels=levels, bits=1, group_size=5, memory=2, run=32
        )
        add_layer(writer, f"subset {subset}", layer)
    writer.finish(**NO_MEMBERS)


CONTENTS: dict[str, Callable[[Writer], None]] = {
    "v1_1": everything,
    "two_level": two_level,
    "outliers": outliers,
    "outliers_wide": wide_outliers,
    "codebook_tables": codebook_tables,
    "codebook_fitted": codebook_fitted,
    "double_quant": double_quantization,
    "int8_rows": int8_rows,
    "trellis": trellis,
}
