"""Small layers of every encoding of versions 1.1 to 1.3: functions of their arguments alone, as `make_layer`."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from format_samples import make_layer

from formats.layer import (
    AffineLinear,
    CodebookLinear,
    DoubleQuant,
    Int8Linear,
    Products,
    QuantizedLinear,
    SparseOutliers,
    Statistic,
    TernaryLinear,
    TrellisLinear,
    TwoLevel,
)


def counting(*shape: int, step: int, below: int) -> npt.NDArray[np.uint8]:
    """0, step, 2 step, ... modulo `below`."""
    return (step * np.arange(int(np.prod(shape)), dtype=np.int64) % below).astype(np.uint8).reshape(shape)


def halves(*shape: int, step: int, start: float = 0.5) -> npt.NDArray[np.float16]:
    """Sixteenths of either sign, from `start` on."""
    return ((counting(*shape, step=step, below=23).astype(np.float32) - 11) / 16 + start).astype(np.float16)


def make_two_level(out_features: int, n_groups: int, bits: int = 3, rows: int = 2, step: int = 3) -> TwoLevel:
    sets = -(-out_features // rows)
    return TwoLevel(
        codes=counting(out_features, n_groups, step=step, below=1 << bits),
        scales=halves(sets, n_groups, step=step + 2),
        zeros=halves(sets, n_groups, step=step + 4, start=1.3),  # rounded to a value that is not a sixteenth
        bits=bits,
        rows=rows,
    )


def make_double_quant(out_features: int, n_groups: int) -> DoubleQuant:
    blocks = -(-out_features * n_groups // 256)
    return DoubleQuant(
        codes=counting(out_features, n_groups, step=37, below=256),
        absmax=(np.arange(1, blocks + 1, dtype=np.float32) / np.float32(7)),
        mean=np.array([0.3], np.float32),
    )


def make_outliers(out_features: int, in_features: int, every: int = 5) -> SparseOutliers:
    """Every so many weights of the matrix in row-major order; where that leaves rows out, they are empty."""
    at = np.arange(every - 1, out_features * in_features, every)
    counts = np.bincount(at // in_features, minlength=out_features)
    return SparseOutliers(
        row_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
        columns=(at % in_features).astype(np.uint16 if in_features <= 65536 else np.uint32),
        values=halves(len(at), step=7, start=0.1),
    )


def with_outliers(layer: Any, every: int = 5) -> Any:
    return replace(layer, outliers=make_outliers(*layer.shape, every))


def with_order(layer: Any, step: int = 5) -> Any:
    """Every step-th input next to each other; step: no divisor of their number."""
    places = step * np.arange(layer.in_features) % layer.in_features
    return replace(layer, input_order=places.astype(np.uint32))


def make_spqr(
    out_features: int = 5,
    in_features: int = 11,
    bits: int = 3,
    group_size: int = 4,
    symmetric: bool = False,
    stat_bits: int = 3,
    stat_rows: int = 2,
    scaled: bool = False,
) -> QuantizedLinear:
    """A `uniform` layer whose statistics are in two levels."""
    plain = make_layer(out_features, in_features, bits, group_size, symmetric, scaled)
    n_groups = -(-in_features // group_size)
    zeros = None if symmetric else make_two_level(out_features, n_groups, stat_bits, stat_rows, step=5)
    return replace(plain, scales=make_two_level(out_features, n_groups, stat_bits, stat_rows), zeros=zeros)


def make_codebook(
    out_features: int = 3,
    in_features: int = 11,
    bits: int = 4,
    group_size: int = 4,
    levels: str = "nf4",
    statistics: str = "f16",
    scaled: bool = False,
) -> CodebookLinear:
    """levels: nf4, fp4 or fitted; statistics: f16, two_level or double_quant."""
    plain = make_layer(out_features, in_features, bits, group_size, scaled=scaled)
    n_groups = plain.scales.shape[1]
    scales: dict[str, Statistic] = {
        "f16": plain.scales,
        "two_level": make_two_level(out_features, n_groups),
        "double_quant": make_double_quant(out_features, n_groups),
    }
    return CodebookLinear(
        codes=plain.codes,
        levels=halves(1 << bits, step=5, start=0.03) if levels == "fitted" else levels,
        scales=scales[statistics],
        bits=bits,
        group_size=group_size,
        input_scales=plain.input_scales,
    )


def make_int8(out_features: int = 3, in_features: int = 11, columns: tuple[int, ...] = (2, 7)) -> Int8Linear:
    codes = (counting(out_features, in_features, step=29, below=255).astype(np.int16) - 127).astype(np.int8)
    codes[:, columns] = 0
    return Int8Linear(
        codes=codes,
        scales=(np.arange(1, out_features + 1, dtype=np.float32) / np.float32(127)),
        columns=np.array(columns, np.uint32) if columns else None,
        values=halves(out_features, len(columns), step=3) if columns else None,
    )


def make_trellis(
    out_features: int = 70,
    in_features: int = 11,
    bits: int = 3,
    group_size: int = 4,
    memory: int = 3,
    run: int = 32,
    statistics: str = "f16",
    scaled: bool = False,
) -> TrellisLinear:
    """Codes without a period that a register could have: squares, not multiples."""
    plain = make_layer(out_features, in_features, 2, group_size, scaled=scaled)
    numbers = np.arange(out_features * in_features, dtype=np.int64).reshape(out_features, in_features)
    two_level = make_two_level(*plain.scales.shape)
    return TrellisLinear(
        codes=(numbers * (numbers + 3) // 6 % (1 << bits)).astype(np.uint8),
        levels=halves(2 << bits, step=5, start=0.03),
        scales=two_level if statistics == "two_level" else plain.scales,
        bits=bits,
        group_size=group_size,
        memory=memory,
        run=run,
        input_scales=plain.input_scales,
    )


def make_ternary(
    out_features: int = 5,
    in_features: int = 71,
    every: int = 7,
    coding: str = "ternary_dict",
    scaled: bool = False,
) -> TernaryLinear:
    """About two values of so many are not zero; without a period, as `make_trellis`."""
    numbers = np.arange(out_features * in_features, dtype=np.int64).reshape(out_features, in_features)
    drawn = numbers * (numbers + 3) // 6 % every
    return TernaryLinear(
        codes=((drawn == 1).astype(np.int8) - (drawn == 0)).astype(np.int8),
        scales=halves(out_features, 2, step=5, start=0.03),
        input_scales=make_layer(1, in_features, group_size=in_features, scaled=True).input_scales if scaled else None,
        coding=coding,
    )


def make_products(out_features: int, n_groups: int, bits: int, groups: int, symmetric: bool, step: int = 3) -> Products:
    return Products(
        codes=counting(out_features, n_groups, step=step, below=1 << bits),
        units=halves(out_features, -(-n_groups // groups), step=step + 2, start=0.1),
        bits=bits,
        groups=groups,
        symmetric=symmetric,
    )


def make_affine(
    out_features: int = 5,
    in_features: int = 37,
    bits: int = 4,
    group_size: int = 4,
    symmetric: bool = False,
    stat_bits: int = 0,
    stat_groups: int = 0,
) -> AffineLinear:
    n_groups = -(-in_features // group_size)
    scales, minima = (halves(out_features, n_groups, step=step, start=0.1) for step in (5, 7))
    if stat_bits:
        products = [
            make_products(out_features, n_groups, stat_bits, stat_groups, symmetric, step=step) for step in (3, 5)
        ]
        scales, minima = products  # type: ignore[assignment]
    return AffineLinear(
        codes=counting(out_features, in_features, step=5, below=1 << bits),
        scales=scales,
        minima=None if symmetric else minima,
        bits=bits,
        group_size=group_size,
    )


LAYERS: dict[str, Any] = {
    "two levels": make_spqr(),
    "two levels, symmetric, input scales": make_spqr(symmetric=True, scaled=True),
    "two levels, more rows than there are": make_spqr(3, stat_rows=7, stat_bits=8),
    "outliers": with_outliers(make_layer(4, 11)),
    "outliers, input scales": with_outliers(make_layer(4, 11, 4, scaled=True), every=3),
    "one outlier": with_outliers(make_layer(4, 11), every=40),
    "nothing but outliers": with_outliers(make_layer(2, 3, group_size=3), every=1),
    "two levels and outliers": with_outliers(make_spqr()),
    "nf4": make_codebook(),
    "fp4, input scales": make_codebook(levels="fp4", scaled=True),
    "nf4, double quantization": make_codebook(40, 33, statistics="double_quant"),  # 360 groups: two blocks
    "fp4, two levels and outliers": with_outliers(make_codebook(levels="fp4", statistics="two_level")),
    "fitted, 3 bits, double quantization": make_codebook(bits=3, levels="fitted", statistics="double_quant"),
    "fitted, 8 bits, all": with_outliers(make_codebook(bits=8, levels="fitted", statistics="two_level", scaled=True)),
    "int8": make_int8(columns=()),
    "int8, two columns": make_int8(),
    "int8, every column": make_int8(2, 3, (0, 1, 2)),
    "trellis": make_trellis(),
    "trellis, 1 bit, all": with_outliers(make_trellis(40, 11, 1, 4, 9, 64, "two_level", scaled=True)),
    "trellis, 6 bits, few rows": make_trellis(5, 11, 6, 11, 7),
    "order of the inputs": with_order(make_layer(3, 37, 3, 8)),
    "order of the inputs, all": with_order(with_outliers(make_spqr(scaled=True))),
    "affine": make_affine(),
    "affine, two levels": make_affine(5, 37, 5, 4, False, 6, 8),
    "affine, two levels, symmetric": make_affine(3, 70, 6, 16, True, 8, 16),
    "ternary": make_ternary(),
    "ternary, input scales": make_ternary(3, 70, 3, scaled=True),
    "ternary by rANS": make_ternary(coding="ternary_rans"),
    "ternary by rANS, two blocks, input scales": make_ternary(37, 83, 4, "ternary_rans", scaled=True),
}
"""One of each kind, by name."""
