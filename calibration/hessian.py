"""The second-order statistics of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRIPE = 256
"""Rows of the Hessian updated per product; only the part right of the diagonal is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """What calibration knows of one input: shared by every linear that reads it."""

    hessian: Tensor  # [in, in] f32: mean over tokens of x xᵀ, undamped (GPTQ, sec. 3.2, without its factor 2)
    n_tokens: int


class HessianAccumulator:
    """Sums x xᵀ over batches in float32; the split into batches changes only the rounding."""

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros(in_features, in_features)
        self.n_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` [..., in]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        for start in range(0, x.shape[1], STRIPE):
            stripe = self._sum[start : start + STRIPE, start:]
            stripe.addmm_(x[:, start : start + STRIPE].T, x[:, start:])
        self.n_tokens += x.shape[0]

    def result(self) -> LayerStats:
        """The mean over all tokens added; ends the accumulation, whose memory it takes over."""
        upper = self._sum.triu_().div_(max(self.n_tokens, 1))
        self._sum = upper.new_empty(0)
        return LayerStats(hessian=upper.add_(torch.triu(upper, 1).T), n_tokens=self.n_tokens)
