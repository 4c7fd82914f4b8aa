"""The energy of a layer's output, and the share of it that is lost (SPEC 5.5)."""

from __future__ import annotations

import torch
from torch import Tensor

ENERGY_COLUMNS = 128
"""Of the product with a Hessian at a time."""
MAX_ELEMENTS = 1 << 21
"""Of it in memory."""


def output_energy(weight: Tensor, hessian: Tensor | None, damping: Tensor | None = None) -> float:
    """tr(W H Wᵀ) of weight [out, in]; H [in, in] less `damping` [in] on its diagonal, or without one the identity."""
    if hessian is None:
        return float(weight.square().sum(dtype=torch.float64))
    energy = 0.0  # H is symmetric: what is left of its diagonal counts twice
    for rows in weight.split(max(1, MAX_ELEMENTS // weight.shape[1])):
        product = torch.empty_like(rows)
        for start in range(0, len(hessian), ENERGY_COLUMNS):
            own, before = slice(start, start + ENERGY_COLUMNS), slice(0, start)
            torch.mm(rows[:, own], hessian[own, own], out=product[:, own])
            product[:, own].addmm_(rows[:, before], hessian[before, own], alpha=2)
        energy += float(product.mul_(rows).sum(1).sum(dtype=torch.float64))
    if damping is not None:
        energy -= float((weight.square().sum(0) * damping).sum(dtype=torch.float64))
    return energy


def relative_error(lost: float, energy: float) -> float:
    """SPEC 5.5: the share `lost` of a layer's output energy."""
    return max(lost, 0.0) / max(energy, 1e-30)
