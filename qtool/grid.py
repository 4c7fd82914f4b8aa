"""The grid of a group: fit (scale, zero) to weights, round weights to codes.

A grid is fitted against the scale as it is stored, that is after rounding to fp16, so that nothing
downstream ever sees another value. Decoding is `formats.layer.decode`, here as in the loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from formats.layer import decode

SHRINK_STEPS = 24
SHRINK_MIN = 0.6  # a group's best range is rarely below this share of its largest weight
MAX_ELEMENTS = 1 << 19  # weights searched at a time: the temporaries then stay in the cache
FP16_TINY = 2.0**-24  # the smallest scale that fp16 stores; an all-zero group gets it


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """scales [G, out] f32 with fp16 values; zeros [G, out] f32 with integer values in 0 .. 2**bits - 1."""

    scales: Tensor
    zeros: Tensor

    def round(self, weight: Tensor, group: int | Tensor, max_code: int) -> Tensor:
        """The codes [..., out] f32 nearest to weight [..., out] on the grid of `group`."""
        return torch.round(weight / self.scales[group]).add_(self.zeros[group]).clamp_(0, max_code)

    def decode(self, codes: Tensor, group: int | Tensor) -> Tensor:
        return decode(codes, self.scales[group], self.zeros[group])


def group_slices(in_features: int, group_size: int) -> Iterator[slice]:
    """The columns of each group; the last one may be short."""
    for start in range(0, in_features, group_size):
        yield slice(start, min(start + group_size, in_features))


def fit_grid(weight: Tensor, group_size: int, bits: int, *, symmetric: bool, hessian: Tensor | None = None) -> Grid:
    """The grid of every group of weight [out, in].

    Without a Hessian the range is the group's smallest to largest weight, zero included. With the (damped)
    hessian [in, in] the range shrinks to where dᵀ H_g d is least, d being the rounding error of one row's
    group and H_g the group's own block of the Hessian.
    """
    scales, zeros = [], []
    for columns in group_slices(weight.shape[1], group_size):
        metric = None if hessian is None else hessian[columns, columns]
        rows = max(1, MAX_ELEMENTS // (columns.stop - columns.start))
        parts = [_fit_group(w, bits, symmetric, metric) for w in weight[:, columns].split(rows)]
        scales.append(torch.cat([scale for scale, _ in parts]))
        zeros.append(torch.cat([zero for _, zero in parts]))
    return Grid(torch.stack(scales), torch.stack(zeros))


def _fit_group(weight: Tensor, bits: int, symmetric: bool, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scale [rows], zero [rows]) for weight [rows, g]."""
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _range_to_grid(low, high, bits, symmetric)
    if metric is None:
        return scale, zero
    best = _weighted_error(weight, scale, zero, bits, metric)
    for shrink in torch.linspace(1, SHRINK_MIN, SHRINK_STEPS)[1:].tolist():
        trial_scale, trial_zero = _range_to_grid(low * shrink, high * shrink, bits, symmetric)
        error = _weighted_error(weight, trial_scale, trial_zero, bits, metric)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial_scale, scale)
        zero = torch.where(better, trial_zero, zero)
    return scale, zero


def _range_to_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    max_code = 2**bits - 1
    scale = ((high - low) / max_code).half().float().clamp_(min=FP16_TINY)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, torch.round(-low / scale).clamp_(0, max_code)


def _weighted_error(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, metric: Tensor) -> Tensor:
    """dᵀ metric d for each row's rounding error d: [rows]."""
    codes = torch.round(weight / scale[:, None]).add_(zero[:, None]).clamp_(0, 2**bits - 1)
    error = decode(codes, scale[:, None], zero[:, None]).sub_(weight)
    return (error @ metric).mul_(error).sum(1)
