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
    absmax: Tensor  # [in] f32: the largest magnitude of each input over the tokens
    n_dropped: int = 0  # tokens left out, because their input holds NaN, infinity or what overflows when squared


class HessianAccumulator:
    """Sums x xᵀ over batches in float32; the split into batches changes only the rounding."""

    def __init__(self, in_features: int) -> None:
        self._sum = torch.zeros(in_features, in_features)
        self._absmax = torch.zeros(in_features)
        self.n_tokens = 0
        self.n_dropped = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` [..., in]."""
        x = self._without_overflow(x.detach().reshape(-1, x.shape[-1]).float())
        for start in range(0, x.shape[1], STRIPE):
            self._sum[start : start + STRIPE, start:].addmm_(x[:, start : start + STRIPE].T, x[:, start:])
        if x.shape[0]:
            torch.maximum(self._absmax, torch.maximum(x.amax(0), -x.amin(0)), out=self._absmax)
        self.n_tokens += x.shape[0]

    def _without_overflow(self, x: Tensor) -> Tensor:
        """The tokens of x [n, in] whose x xᵀ is finite; one bad token would make the whole sum NaN."""
        energy = torch.linalg.vector_norm(x, dim=1).square_()
        if torch.isfinite(energy.sum()):  # then each of them is
            return x
        finite = torch.isfinite(energy)
        self.n_dropped += int((~finite).sum())
        return x[finite]

    def result(self) -> LayerStats:
        """The mean over all tokens added; ends the accumulation, whose memory it takes over."""
        upper = self._sum.triu_().div_(max(self.n_tokens, 1))
        hessian, self._sum = upper.add_(torch.triu(upper, 1).T), torch.empty(0)
        return LayerStats(hessian, self.n_tokens, self._absmax, self.n_dropped)
