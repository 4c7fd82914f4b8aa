"""STAGE 3, quantize: GPTQ's second-order solver for one layer, a pure function (arXiv 2210.17323).

Columns are rounded one after the other; what each one loses is made up for by the columns that are still free. The
paper's Algorithm 1 asks the inverse Hessian by how much, updated after every column. No inverse is needed: with
H = M D Mᵀ, M upper with a diagonal of 1, a loss d = w - q costs d H dᵀ = Σ_j D_jj (Σ_{i <= j} d_i M_ij)², and as M_jj
is 1, column j makes its term least where it is rounded from w_j + Σ_{i < j} d_i M_ij. The codes are those of the paper,
as Babai's nearest plane algorithm finds them (arXiv 2507.18553), and the factor takes n³/3 operations, not 4n³/3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration.hessian import LayerStats
from formats.layer import Layer, SparseOutliers, group_index
from qtool.energy import output_energy, relative_error
from qtool.factor import Factor
from qtool.fit import fit_grid
from qtool.grid import Columns, Grid
from qtool.outliers import OutlierList, OutlierRule, kept_values, relative_threshold, threshold_of_rate
from qtool.recipe import QuantSpec

MAX_ELEMENTS = 1 << 22
"""Weights solved at a time: with the solver's temporaries, some 150 MB."""
BLOCK_SIZE = 64
"""Columns whose losses are pushed to all later ones by one product: changes speed and rounding only."""
THRESHOLD_ROWS = 128
"""Rows that are solved to learn which error the given share of the weights exceeds."""
SECOND_SHARE = 0.97
"""Of the outliers that there may be: so many a second threshold is to find, as it moves other weights beyond it."""


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A quantized layer and what it cost."""

    layer: Layer
    decoded: Tensor  # [out, in] f32: the weight that the file will decode to
    relative_error: float  # tr(d H dᵀ) / tr(W H Wᵀ): share of the output's energy that is lost


def gptq_quantize(weight: Tensor, factor: Factor, spec: QuantSpec) -> Solution:
    """GPTQ of weight [out, in] f32: groups are static, fitted before the first column is rounded."""
    return solve_columns(weight, *fit_layer(weight, factor, spec), factor, spec)


def solve_columns(weight: Tensor, grid: Grid, rule: OutlierRule | None, factor: Factor, spec: QuantSpec) -> Solution:
    """GPTQ of weight [out, in] f32 with a grid that has been fitted."""
    return _solve(weight, grid, spec, factor, rule, (factor.damped, factor.damping))


def rtn_quantize(weight: Tensor, spec: QuantSpec, stats: LayerStats | None = None) -> Solution:
    """Round to nearest: every weight on its own; statistics, where there are some, only say what the error is.

    Without them it is that of the weights.
    """
    return _solve(weight, fit_grid(weight, spec), spec, None, None, (stats.hessian if stats else None, None))


def fit_layer(weight: Tensor, factor: Factor, spec: QuantSpec) -> tuple[Grid, OutlierRule | None]:
    """The grid of weight [out, in], and the rule by which its outliers are kept."""
    rule = None
    if spec.keeps_outliers:
        rule = OutlierRule(_threshold(weight, factor, spec), factor.cost)
    return fit_grid(weight, spec, factor.input_scales, factor.cost, _metric(factor, spec), rule), rule


def _metric(factor: Factor, spec: QuantSpec) -> Tensor | None:
    return factor.damped if spec.scale_search else None


def _threshold(weight: Tensor, factor: Factor, spec: QuantSpec) -> float:
    """What the error of a weight must cost to be kept; by a rate, the least that keeps no more of some of the rows."""
    unit = outlier_unit(weight, factor)
    if spec.threshold:
        return spec.threshold * unit
    rows = weight[:: max(1, len(weight) // THRESHOLD_ROWS)]
    return unit * threshold_of_rate(spec.outliers, lambda t: _kept_share(rows, factor, spec, unit * t))


def outlier_unit(weight: Tensor, factor: Factor) -> float:
    """What a relative threshold of 1 is for weight [out, in]."""
    cost = factor.cost if factor.input_scales is None else factor.cost / factor.input_scales.square()
    return relative_threshold(weight, cost)


def _kept_share(weight: Tensor, factor: Factor, spec: QuantSpec, threshold: float) -> float:
    """The share of weight [rows, in] that is kept at a threshold."""
    rule, kept = OutlierRule(threshold, factor.cost), OutlierList()
    grid = fit_grid(weight, spec, factor.input_scales, factor.cost, _metric(factor, spec), rule)
    _round_columns(factor.stored(weight), factor, grid, groups_of(weight.shape[1], spec), rule, partial(kept.add, 0))
    return len(kept) / weight.numel()


def groups_of(in_features: int, spec: QuantSpec) -> Tensor:
    """[in] i64: the group of each column."""
    return torch.from_numpy(group_index(in_features, spec.groups_of(in_features)))


def _solve(
    weight: Tensor,
    grid: Grid,
    spec: QuantSpec,
    factor: Factor | None,
    rule: OutlierRule | None,
    metric: tuple[Tensor | None, Tensor | None],
    *,
    is_last: bool = False,
) -> Solution:
    """Solve weight [out, in] a stripe of rows at a time: rows do not touch each other, and temporaries stay small.

    metric: what the error is measured by, as `output_energy` takes it. Where more outliers are found than there may
    be, it is all solved again with a higher threshold: later columns made up for nothing in those that are dropped.
    """
    out_features, in_features = weight.shape
    groups, kept = groups_of(in_features, spec), OutlierList()
    decoded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    codes = np.empty((out_features, in_features), np.uint8)
    lost_energy = 0.0
    for rows in _stripes(weight.shape, grid.row_step):
        stored = weight[rows] if factor is None else factor.stored(weight[rows])
        solved = _quantize_rows(stored, grid.rows(rows), groups, factor, rule, partial(kept.add, rows.start))
        codes[rows] = solved.codes.numpy().T
        decoded[rows] = solved.decoded.T
        lost_energy += solved.lost_energy
    if factor is not None and rule is not None and spec.outliers:
        at_most = round(spec.outliers * weight.numel())
        if len(kept) > at_most and not is_last:
            raised = OutlierRule(
                max(rule.threshold, kept.threshold_of(round(SECOND_SHARE * at_most), factor.cost)), rule.cost
            )
            return _solve(weight, grid, spec, factor, raised, metric, is_last=True)
        kept.cut(at_most, factor.cost)
    kept.add_to(decoded)
    known = lost_energy if factor is not None and rule is None else None
    outliers = kept.sparse((out_features, in_features))
    return finished(weight, codes, decoded, grid, spec, factor, metric, outliers, known)


def finished(
    weight: Tensor,
    codes: np.ndarray[Any, Any],
    decoded: Tensor,
    grid: Grid,
    spec: QuantSpec,
    factor: Factor | None,
    metric: tuple[Tensor | None, Tensor | None],
    outliers: SparseOutliers | None = None,
    lost_energy: float | None = None,
) -> Solution:
    """The solution of weight [out, in] from its codes and what they decode to, outliers included; input scales, which
    are still to come, are multiplied into `decoded`.

    lost_energy: where it is known already.
    """
    energy, lost = 0.0, lost_energy or 0.0
    for rows in _stripes(weight.shape, grid.row_step):
        stored = weight[rows] if factor is None else factor.stored(weight[rows])
        energy += output_energy(stored, *metric)
        if lost_energy is None:
            lost += output_energy(stored - decoded[rows], *metric)
    scales = None if factor is None else factor.input_scales
    fp16_scales = None if scales is None else scales.numpy().astype(np.float16)
    layer = grid.layer(codes, spec.groups_of(weight.shape[1]), fp16_scales, outliers)
    return Solution(
        layer,
        decoded if scales is None else decoded.mul_(scales),
        relative_error(lost, energy),
    )


def _stripes(shape: Sequence[int], row_step: int) -> list[slice]:
    """Rows that are solved together."""
    step = max(1, MAX_ELEMENTS // (shape[1] * row_step)) * row_step
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


@dataclass(frozen=True, slots=True, eq=False)
class _Solved:
    """Some rows, transposed as the solver works on them, in the layer's own column order."""

    codes: Tensor  # [in, rows] u8
    decoded: Tensor  # [in, rows] f32, without what was kept of outliers and without input scales
    lost_energy: float = 0.0  # by the Hessian without its damping, where no rule keeps any of it


def _quantize_rows(
    stored: Tensor,
    grid: Grid,
    groups: Tensor,
    factor: Factor | None,
    rule: OutlierRule | None,
    keep: Callable[[int, Tensor], None],
) -> _Solved:
    if factor is None:
        codes, decoded = grid.quantize(stored.T, groups)
        return _Solved(codes.to(torch.uint8), decoded)
    return _round_columns(stored, factor, grid, groups, rule, keep)


def _round_columns(
    weight: Tensor,
    factor: Factor,
    grid: Grid,
    groups: Tensor,
    rule: OutlierRule | None = None,
    keep: Callable[[int, Tensor], None] = lambda column, kept: None,
    block_size: int = BLOCK_SIZE,
) -> _Solved:
    """GPTQ's loop over the columns of weight [rows, in]; `keep` is handed each column's outliers.

    groups: [in] i64
    """
    perm = factor.perm
    is_in_order = torch.equal(perm, torch.arange(len(perm)))  # then slices will do, which is a good deal faster
    # [in, rows]: a column is a contiguous row here. A copy also where the weight lies so already, for it is changed.
    free = weight.T.clone(memory_format=torch.contiguous_format) if is_in_order else weight.T[perm].contiguous()
    columns = Columns.of(free, factor.shares, groups if is_in_order else groups[perm])
    for start in range(0, len(free), block_size):
        own = slice(start, min(start + block_size, len(free)))
        limits = None if rule is None else rule.limits(factor.pivots[own])
        grid.round_block(columns, own, limits)
        if limits is not None:
            for column, kept in zip(
                perm[own].tolist(), kept_values(free[own] - columns.decoded[own], limits), strict=True
            ):
                keep(column, kept)
        free[own.stop :].addmm_(factor.shares[own, own.stop :].T, columns.lost[own])
    lost_energy = 0.0
    if rule is None:
        lost_energy = _energy(free.sub_(columns.decoded), factor.pivots) - _energy(columns.lost, factor.damping[perm])
    if is_in_order:
        return _Solved(columns.codes, columns.decoded, lost_energy)
    back = perm.argsort()
    return _Solved(columns.codes[back], columns.decoded[back], lost_energy)


def _energy(columns: Tensor, weights: Tensor) -> float:
    """The sum of squares of columns [in, rows], each of which counts by its weight [in]."""
    return float(torch.linalg.vector_norm(columns, dim=1).double().square_() @ weights.double())
