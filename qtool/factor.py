"""A damped Hessian, factored for the solver; and the factors that even out its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.hessian import LayerStats
from qtool.cholesky import inverse_diagonal, upper_factor
from qtool.errors import QuantizeError
from qtool.recipe import QuantSpec

MAX_DAMPING_STEPS = 5
INPUT_SCALE_RANGE = (2.0**-10, 2.0**10)  # well inside fp16, with all of its precision


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A damped Hessian, factored in the order of perm, H = M D Mᵀ: shared by all linears that read one input."""

    input_scales: Tensor | None  # [in] f32 with fp16 values: what the input is multiplied by before the layer
    perm: Tensor  # [in] int64: the order in which columns are rounded
    shares: Tensor  # [in, in] f32: M, upper with a diagonal of 1, rows and columns in the order of perm
    pivots: Tensor  # [in] f32: D, in the order of perm: what an error costs once later columns have made up for it
    damped: Tensor  # [in, in] f32: the damped Hessian of the scaled input, in the layer's own order
    damping: Tensor  # [in] f32: what was added to its diagonal
    percdamp: float  # what it took to factor it

    def stored(self, weight: Tensor) -> Tensor:
        """weight [rows, in] as it is stored: its input scales divided out."""
        return weight if self.input_scales is None else weight / self.input_scales

    @property
    def cost(self) -> Tensor:
        """[in] f32: the pivots in the layer's own order."""
        cost = torch.empty_like(self.pivots)
        cost[self.perm] = self.pivots
        return cost


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
        cost = inverse_diagonal(_damp(damped, percdamp).double()).reciprocal_()
        input_scales = fit_input_scales(weights, cost)
        damped.copy_(hessian).mul_(input_scales).mul_(input_scales[:, None])
    diagonal = damped.diagonal().clone()
    ordered = _damp(damped, percdamp)
    if spec.act_order:
        perm = torch.argsort(diagonal, descending=True, stable=True)
        ordered = ordered.index_select(0, perm).index_select(1, perm)
    else:
        perm = torch.arange(len(diagonal))
    upper = upper_factor(ordered.double())
    roots = upper.diagonal().clone()
    return Factor(
        input_scales=input_scales,
        perm=perm,
        shares=upper.div_(roots).float(),
        pivots=roots.square_().float(),
        damped=damped,
        damping=damped.diagonal() - diagonal,
        percdamp=percdamp,
    )


def _damp(hessian: Tensor, percdamp: float) -> Tensor:
    """H + λ I in place, λ = percdamp · mean of the diagonal."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    unseen = diagonal == 0
    # A feature that no calibration token activates has a zero row. Its weight cannot change the output on
    # this data, so its pivot is pinned and it rounds to nearest, which is right for inputs not seen here.
    diagonal.add_(percdamp * mean).masked_fill_(unseen, mean or 1.0)
    return hessian


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
