"""Grids whose codes index a table of levels: NF4, FP4, and levels fitted to a layer (k-bit formats)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from formats.layer import CodebookLinear, DoubleQuant, Layer, SparseOutliers, TwoLevel
from formats.layer.codebook import level_table
from qtool.grid import Grid, fit_ranges, full_range, range_fit
from qtool.outliers import OutlierRule
from qtool.recipe import QuantSpec
from qtool.statistics import FP16_TINY, by_row, round_double, round_two_level

LLOYD_STEPS = 25
FIT_SAMPLE = 1 << 17
"""Weights that a table of at most 256 levels is fitted to."""


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """A table in the order of its codes, and sorted, as nearest neighbours are looked up."""

    name: str  # nf4, fp4, or fitted
    values: Tensor  # [2**bits] f32, code by code
    order: Tensor  # [2**bits] f32: the code of each sorted level
    midpoints: Tensor  # [2**bits - 1] f32, between sorted levels

    @classmethod
    def of(cls, name: str, values: Tensor) -> Levels:
        ordered, order = values.sort(stable=True)
        return cls(name, values, order.float(), (ordered[1:] + ordered[:-1]) / 2)

    def quantize(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, their levels), those nearest to `units` of any shape."""
        codes = self.order[torch.bucketize(units.contiguous(), self.midpoints)]
        return codes, self.values[codes.long()]


@dataclass(frozen=True, eq=False)
class CodebookGrid(Grid):
    """scale * levels[code]: scales [G, out] f32 as stored."""

    scales: Tensor
    levels: Levels
    bits: int
    stored: TwoLevel | DoubleQuant | None = None  # the scales, where they are not plain fp16

    def rows(self, stripe: slice) -> CodebookGrid:
        return CodebookGrid(self.scales[:, stripe], self.levels, self.bits)

    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scales[group]
        codes, units = self.levels.quantize(weight / scale.where(scale != 0, 1.0))
        return codes, scale * units

    def layer(
        self, codes: np.ndarray, group_size: int, input_scales: np.ndarray | None, outliers: SparseOutliers | None
    ) -> Layer:
        fitted = self.levels.name == "fitted"
        return CodebookLinear(
            codes=codes,
            scales=by_row(self.scales, np.float16) if self.stored is None else self.stored,
            levels=self.levels.values.numpy().astype(np.float16) if fitted else self.levels.name,
            bits=self.bits,
            group_size=group_size,
            input_scales=input_scales,
            outliers=outliers,
        )


def choose_levels(weight: Tensor, spec: QuantSpec, input_scales: Tensor | None, cost: Tensor | None) -> Levels:
    """The table for a layer: the named one, or one fitted to weight [out, in], its input scales [in] divided out.

    cost: [in], what an error in a column costs; None counts all alike.
    """
    if spec.format != "fitted":
        return Levels.of(spec.format, torch.from_numpy(level_table(spec.format).copy()))
    step = max(1, weight.numel() // FIT_SAMPLE)
    rows = weight[::step] if input_scales is None else weight[::step] / input_scales
    group_size = spec.groups_of(weight.shape[1])
    _, scales = fit_ranges(rows, None, group_size, lambda w, _: full_range(w, symmetric=True))
    scale = scales.clamp(min=FP16_TINY).T.repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    importance = scale.square() if cost is None else scale.square() * cost
    return Levels.of("fitted", fit_levels((rows / scale).flatten(), importance.flatten(), spec.bits))


def fit_levels(units: Tensor, importance: Tensor, bits: int) -> Tensor:
    """2**bits levels [2**bits] f32 with fp16 values for values [n] weighted by importance [n]: Lloyd's algorithm."""
    n = 2**bits
    quantiles = (torch.arange(n) + 0.5) / n
    ordered, order = units.sort()
    share = importance[order].double().cumsum(0)
    levels = ordered[torch.searchsorted(share / share[-1], quantiles.double()).clamp_(max=len(units) - 1)]
    weighted = (units * importance).double()
    for _ in range(LLOYD_STEPS):
        codes = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros(n, dtype=torch.float64).index_add_(0, codes, importance.double())
        total = torch.zeros(n, dtype=torch.float64).index_add_(0, codes, weighted)
        levels = torch.where(mass > 0, (total / mass.clamp(min=1e-300)).float(), levels).sort().values
    return levels.half().float()


def fit_codebook(
    weight: Tensor,
    spec: QuantSpec,
    levels: Levels,
    *,
    input_scales: Tensor | None = None,
    hessian: Tensor | None = None,
    rule: OutlierRule | None = None,
) -> CodebookGrid:
    """The grid of every group of weight [out, in], its input scales [in] divided out.

    A group is scaled by its largest magnitude, or with a Hessian [in, in] by the share of it that loses least.
    """

    def decoded(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale = torch.maximum(-low, high).half().float().clamp_(min=FP16_TINY)[:, None]
        return scale * levels.quantize(rows / scale)[1]

    fit = range_fit(decoded, True, hessian, rule)
    _, scales = fit_ranges(weight, input_scales, spec.groups_of(weight.shape[1]), fit)
    if spec.double_quant:
        stored, scales = round_double(scales)
        return CodebookGrid(scales, levels, spec.bits, stored)
    if spec.stat_bits:
        two_level, scales = round_two_level(scales, spec.stat_bits, spec.stat_rows)
        return CodebookGrid(scales, levels, spec.bits, two_level)
    return CodebookGrid(scales.half().float().clamp_(min=FP16_TINY), levels, spec.bits)
