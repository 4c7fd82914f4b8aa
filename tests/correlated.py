"""Layers whose inputs are correlated, and what a solution of one loses."""

from __future__ import annotations

import torch

from calibration.hessian import LayerStats


def make_layer(rows: int = 24, columns: int = 40, seed: int = 0) -> tuple[torch.Tensor, LayerStats]:
    """A weight, and the statistics of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 3, columns)
    x = torch.randn(500, columns, generator=generator) @ mix
    return weight, LayerStats(x.T @ x / 500, 500, x.abs().amax(0))


def output_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor) -> float:
    """SPEC 5.5 in float64."""
    w, d, h = weight.double(), (weight - decoded).double(), hessian.double()
    return (torch.trace(d @ h @ d.T) / torch.trace(w @ h @ w.T)).item()


def stats_of(hessian: torch.Tensor, n_tokens: int) -> LayerStats:
    """The statistics of inputs of which only the Hessian matters."""
    return LayerStats(hessian, n_tokens, hessian.diagonal().clamp(min=0).sqrt())
