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
    per_token: Tensor | None = None  # [in, in] f32: the Hessian with every x scaled to length 1, where it was asked for


class HessianAccumulator:
    """Sums x xᵀ over batches in float32; the split into batches changes only the rounding.

    per_token: sum x xᵀ / |x|² too, in which a few tokens with massive activations count no more than any others.
    """

    def __init__(self, in_features: int, *, per_token: bool = False) -> None:
        self._sum = torch.zeros(in_features, in_features)
        self._per_token = torch.zeros(in_features, in_features) if per_token else None
        self._absmax = torch.zeros(in_features)
        self.n_tokens = 0
        self.n_dropped = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` [..., in]."""
        x = self._without_overflow(x.detach().reshape(-1, x.shape[-1]).float())
        _add_outer_products(self._sum, x)
        if self._per_token is not None:
            _add_outer_products(self._per_token, torch.nn.functional.normalize(x, dim=1))
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
        per_token = None if self._per_token is None else _mean(self._per_token, self.n_tokens)
        hessian, self._sum, self._per_token = _mean(self._sum, self.n_tokens), torch.empty(0), None
        return LayerStats(hessian, self.n_tokens, self._absmax, self.n_dropped, per_token)


def _add_outer_products(total: Tensor, x: Tensor) -> None:
    """Add those of the tokens of x [n, in] to the upper triangle of `total` [in, in]."""
    for start in range(0, x.shape[1], STRIPE):
        total[start : start + STRIPE, start:].addmm_(x[:, start : start + STRIPE].T, x[:, start:])


def _mean(total: Tensor, n: int) -> Tensor:
    """The whole matrix over n, of which `total` has the upper triangle; in its memory."""
    upper = total.triu_().div_(max(n, 1))
    return upper.add_(torch.triu(upper, 1).T)
