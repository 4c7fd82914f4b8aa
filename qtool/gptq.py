"""STAGE 3, quantize: GPTQ's second-order solver for one layer, a pure function (arXiv 2210.17323).

Columns are rounded one after the other; each one's rounding error is made up for by the columns that
are still free, along the inverse Hessian. Its Cholesky factor U (H⁻¹ = UᵀU, upper) already holds the
rows that the paper's Algorithm 1 would get by updating the inverse after every column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from calibration.hessian import LayerStats
from formats.layer import QuantizedLinear, group_index
from qtool.errors import QuantizeError
from qtool.grid import Grid, fit_grid
from qtool.recipe import QuantSpec

MAX_ELEMENTS = 1 << 22
"""Weights solved at a time: with the solver's temporaries, some 150 MB."""
BLOCK_SIZE = 64
"""Columns whose errors are pushed to all later ones by one product: changes speed and rounding only."""
MAX_DAMPING_STEPS = 5
INPUT_SCALE_RANGE = (2.0**-10, 2.0**10)  # well inside fp16, with all of its precision


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A damped Hessian, factored: shared by all linears that read one input."""

    input_scales: Tensor | None  # [in] f32 with fp16 values: what the input is multiplied by before the layer
    perm: Tensor  # [in] int64: the order in which columns are rounded
    hinv_chol: Tensor  # [in, in] f32: U with H⁻¹ = UᵀU, rows and columns in the order of perm
    damped: Tensor  # [in, in] f32: the damped Hessian of the scaled input, in the layer's own order
    damping: Tensor  # [in] f32: what was added to its diagonal
    percdamp: float  # what it took to factor it


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A quantized layer and what it cost."""

    layer: QuantizedLinear
    decoded: Tensor  # [out, in] f32: the weight that the file will decode to
    relative_error: float  # tr(d H dᵀ) / tr(W H Wᵀ): share of the output's energy that is lost


def factorize(stats: LayerStats, weights: Sequence[Tensor], spec: QuantSpec, name: str) -> Factor:
    """The factor for the linears with `weights` that read one input, damped until it is positive definite."""
    for step in range(MAX_DAMPING_STEPS):
        percdamp = spec.percdamp * 10**step
        try:
            return _factorize(stats.hessian, weights, spec, percdamp)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
    raise QuantizeError(
        f"{name}: Hessian not positive definite even with percdamp={percdamp:g} and {stats.n_tokens} tokens; "
        "use more calibration tokens (--samples, --seq-len) or a larger --percdamp"
    )


def _factorize(hessian: Tensor, weights: Sequence[Tensor], spec: QuantSpec, percdamp: float) -> Factor:
    input_scales = None
    damped = hessian.clone()
    if spec.input_scales:
        cost = 1 / _inverse(_damp(damped, percdamp)).diagonal()
        input_scales = fit_input_scales(weights, cost)
        damped.copy_(hessian).mul_(input_scales).mul_(input_scales[:, None])
    diagonal = damped.diagonal().clone()
    perm = torch.argsort(diagonal, descending=True, stable=True) if spec.act_order else torch.arange(len(diagonal))
    inverse = _inverse(_damp(damped, percdamp)[perm[:, None], perm])
    hinv_chol = torch.linalg.cholesky(inverse, upper=True, out=inverse)
    rows = torch.empty(inverse.shape).copy_(hinv_chol)  # the solver reads it row by row
    return Factor(input_scales, perm, rows, damped, damped.diagonal() - diagonal, percdamp)


def _damp(hessian: Tensor, percdamp: float) -> Tensor:
    """H + λ I in place, λ = percdamp · mean of the diagonal."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    unseen = diagonal == 0
    # A feature that no calibration token activates has a zero row. Its weight cannot change the output on
    # this data, so its pivot is pinned and it rounds to nearest, which is right for inputs not seen here.
    diagonal.add_(percdamp * mean).masked_fill_(unseen, mean or 1.0)
    return hessian


def _inverse(damped: Tensor) -> Tensor:
    """The inverse [in, in] f64 of a symmetric f32 matrix; LinAlgError if it is not positive definite.

    LAPACK works column by column: on the transpose, which is the same matrix, each step is done in place, where it
    would take a copy of its own otherwise.
    """
    work = damped.double().T
    torch.linalg.cholesky(work, out=work)
    return torch.cholesky_inverse(work, out=work)


def fit_input_scales(weights: Sequence[Tensor], cost: Tensor) -> Tensor:
    """Factors t [in] f32 with fp16 values that let inputs of one group share a grid at the least cost.

    Stored columns are w_j / t_j. A group's step follows the size of its columns, so what its error costs is about
    (Σ σ_j² / t_j²) · (Σ c_j t_j²), where σ_j is the root mean square of column j over all weights [out, in] that
    read this input, and `cost` c_j = 1 / [H⁻¹]_jj is what an error in column j costs once the others have made up
    for it (as in OBS). By Cauchy-Schwarz it is least for t_j² = σ_j / √c_j. AWQ (arXiv 2306.00978) searches for
    such factors by trial; here they follow from the Hessian, and GPTQ works on what they leave.
    """
    rows = sum(len(weight) for weight in weights)
    norms = [torch.linalg.vector_norm(weight, dim=0) for weight in weights]
    column = torch.stack(norms).square_().sum(0).div_(rows)  # [in] σ²
    scales = (_floored(column).double() / _floored(cost)).sqrt_().sqrt_()
    scales /= scales.log().mean().exp()
    return scales.clamp_(*INPUT_SCALE_RANGE).half().float()


def _floored(values: Tensor) -> Tensor:
    """No value below a millionth of the mean: an input or column that is all zero has no scale of its own."""
    mean = values.mean().item()
    return values.clamp(min=1e-6 * mean if mean else 1.0)


def gptq_quantize(weight: Tensor, factor: Factor, spec: QuantSpec) -> Solution:
    """GPTQ of weight [out, in] f32: groups are static, fitted before the first column is rounded."""
    group_size, scales = spec.groups_of(weight.shape[1]), factor.input_scales
    metric = factor.damped if spec.scale_search else None

    def solve(rows: Tensor) -> _Rows:
        stored = rows if scales is None else rows / scales
        grid = fit_grid(stored, group_size, spec.bits, symmetric=spec.symmetric, hessian=metric)
        codes = _round_columns(stored, factor, grid, group_size, spec.bits)
        return _rows(stored, codes, grid, group_size, factor)

    return _solution(weight, solve, spec, scales)


def rtn_quantize(weight: Tensor, spec: QuantSpec) -> Solution:
    """Round to nearest: every weight on its own, no calibration; the error reported is that of the weights."""
    group_size = spec.groups_of(weight.shape[1])

    def solve(rows: Tensor) -> _Rows:
        grid = fit_grid(rows, group_size, spec.bits, symmetric=spec.symmetric)
        groups = torch.from_numpy(group_index(rows.shape[1], group_size))
        codes = grid.round(rows.T, groups, 2**spec.bits - 1)
        return _rows(rows, codes, grid, group_size, None)

    return _solution(weight, solve, spec, None)


def _round_columns(
    weight: Tensor, factor: Factor, grid: Grid, group_size: int, bits: int, block_size: int = BLOCK_SIZE
) -> Tensor:
    """The codes [in, out] f32 (rows in the layer's own column order) of GPTQ's loop over columns."""
    free = weight.T[factor.perm].contiguous()  # [in, out]: a column of the paper is a contiguous row here
    codes = torch.empty_like(free)
    groups = (factor.perm // group_size).tolist()
    diagonal = factor.hinv_chol.diagonal().tolist()
    for start in range(0, len(free), block_size):
        stop = min(start + block_size, len(free))
        errors = torch.empty_like(free[start:stop])
        for j in range(start, stop):
            codes[j] = grid.round(free[j], groups[j], 2**bits - 1)
            error = errors[j - start]
            torch.sub(free[j], grid.decode(codes[j], groups[j]), out=error).div_(diagonal[j])
            free[j + 1 : stop].addr_(factor.hinv_chol[j, j + 1 : stop], error, alpha=-1)
        free[stop:].addmm_(factor.hinv_chol[start:stop, stop:].T, errors, alpha=-1)
    ordered = torch.empty_like(codes)
    ordered[factor.perm] = codes
    return ordered


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Some rows of a solution, as the file will hold them."""

    codes: np.ndarray  # [rows, in] u8
    scales: np.ndarray  # [rows, G] f16
    zeros: np.ndarray  # [rows, G] u8
    decoded: Tensor  # [rows, in] f32, input scales not applied
    lost: float  # tr(d H dᵀ)
    energy: float  # tr(W H Wᵀ)


def _rows(stored: Tensor, codes: Tensor, grid: Grid, group_size: int, factor: Factor | None) -> _Rows:
    """For rows `stored` [rows, in], their input scales divided out, and their codes [in, rows]."""
    groups = torch.from_numpy(group_index(len(codes), group_size))
    decoded = grid.decode(codes, groups).T.contiguous()
    metric = (None, None) if factor is None else (factor.damped, factor.damping)
    return _Rows(
        codes=_numpy(codes, np.uint8),
        scales=_numpy(grid.scales, np.float16),
        zeros=_numpy(grid.zeros, np.uint8),
        decoded=decoded,
        lost=output_energy(stored - decoded, *metric),
        energy=output_energy(stored, *metric),
    )


def _solution(
    weight: Tensor, solve: Callable[[Tensor], _Rows], spec: QuantSpec, input_scales: Tensor | None
) -> Solution:
    """Solve weight [out, in] a stripe of rows at a time: rows do not touch each other, and temporaries stay small."""
    decoded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    stripes = []
    step = max(1, MAX_ELEMENTS // weight.shape[1])
    for rows, target in zip(weight.split(step), decoded.split(step), strict=True):
        stripe = solve(rows)
        target.copy_(stripe.decoded)
        stripes.append(replace(stripe, decoded=target))
    layer = QuantizedLinear(
        codes=np.concatenate([stripe.codes for stripe in stripes]),
        scales=np.concatenate([stripe.scales for stripe in stripes]),
        zeros=None if spec.symmetric else np.concatenate([stripe.zeros for stripe in stripes]),
        bits=spec.bits,
        group_size=spec.groups_of(weight.shape[1]),
        input_scales=None if input_scales is None else input_scales.numpy().astype(np.float16),
    )
    error = relative_error(sum(stripe.lost for stripe in stripes), sum(stripe.energy for stripe in stripes))
    return Solution(layer, decoded if input_scales is None else decoded.mul_(input_scales), error)


def output_energy(weight: Tensor, hessian: Tensor | None, damping: Tensor | None = None) -> float:
    """tr(W H Wᵀ) of weight [out, in]; H [in, in] less `damping` [in] on its diagonal, or without one the identity."""
    energy = float(((weight if hessian is None else weight @ hessian) * weight).sum(dtype=torch.float64))
    return energy if damping is None else energy - float((weight.square().sum(0) * damping).sum(dtype=torch.float64))


def relative_error(lost: float, energy: float) -> float:
    """SPEC 5.5: the share `lost` of a layer's output energy."""
    return max(lost, 0.0) / max(energy, 1e-30)


def _numpy(transposed: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """[rows, out] -> numpy [out, rows], contiguous."""
    return np.ascontiguousarray(transposed.numpy().T.astype(dtype))
