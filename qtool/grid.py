"""What a layer's weights are rounded to: fitted once, then asked column by column.

A grid is fitted against its scales as they are stored, so that nothing downstream ever sees another value. Decoding
is `formats.layer.decode`, here as in the loader.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from formats.layer import Layer, QuantizedLinear, SparseOutliers, TwoLevel, decode
from qtool.outliers import OutlierRule
from qtool.statistics import FP16_TINY, by_row, round_two_level

SHRINK_STEPS = 24
SHRINK_MIN = 0.6  # a group's best range is rarely below this share of its largest weight
MAX_ELEMENTS = 1 << 19  # weights searched at a time: the temporaries then stay in the cache
TOGETHER = 1 << 17  # of few weights, those of many ranges: less than that, and the interpreter takes most of the time


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The columns of a layer, each a contiguous row here, in the order in which the solver rounds them."""

    free: Tensor  # [in, rows] f32, changed: what is left to round, other columns' losses made up for
    lost: Tensor  # [in, rows] f32, changed: the weights, less what they became once their column is rounded
    shares: Tensor  # [in, in] f32: M, how much of what one column lost each later one makes up for
    groups: Tensor  # [in] i64
    codes: Tensor  # [in, rows] u8; this and what follows is written as columns are rounded
    decoded: Tensor  # [in, rows] f32

    @classmethod
    def of(cls, weight: Tensor, shares: Tensor, groups: Tensor) -> Columns:
        """weight: [in, rows] f32, which is changed."""
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        return cls(weight, weight.clone(), shares, groups, codes, torch.empty_like(weight))

    def block(self, own: slice) -> Columns:
        """A part of them, which do not know of those outside."""
        return Columns(
            self.free[own], self.lost[own], self.shares[own, own], self.groups[own], self.codes[own], self.decoded[own]
        )


class Grid(ABC):
    """The values that the weights of a layer can take."""

    row_step: int = 1  # rows are solved in stripes that begin on a multiple of it

    @abstractmethod
    def rows(self, stripe: slice) -> Grid:
        """The grid of some rows, to quantize them with."""

    @abstractmethod
    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        """(codes, what they decode to) for a column [out] of `group`, or columns [n, out] with their groups [n]."""

    def round_block(self, columns: Columns, own: slice, limits: Tensor | None = None) -> None:
        """GPTQ over the b columns `own`: what each one lost is made up for by those of them behind it.

        limits: [b], an error beyond which is an outlier's: it is stored as well, and the weight becomes what was free
        """
        block = columns.block(own)
        free, lost, decoded = block.free, block.lost, block.decoded
        for j, group in enumerate(block.groups.tolist()):
            block.codes[j], decoded[j] = self.quantize(free[j], group)
            became = decoded[j]
            if limits is not None:
                became = torch.where((free[j] - became).abs() > limits[j], free[j], became)
            lost[j].sub_(became)
            free[j + 1 :].addcmul_(block.shares[j, j + 1 :, None], lost[j])

    @abstractmethod
    def layer(
        self, codes: np.ndarray, group_size: int, input_scales: np.ndarray | None, outliers: SparseOutliers | None
    ) -> Layer:
        """The layer as the file will hold it, from codes [out, in] u8."""


@dataclass(frozen=True, eq=False)
class UniformGrid(Grid):
    """scale * (code - zero): scales [G, out] f32 as stored; zeros [G, out] f32, in two levels not integers."""

    scales: Tensor
    zeros: Tensor
    bits: int
    symmetric: bool = False
    levels: tuple[TwoLevel, TwoLevel | None] | None = None  # scales and zeros as stored, in two levels

    def rows(self, stripe: slice) -> UniformGrid:
        return UniformGrid(self.scales[:, stripe], self.zeros[:, stripe], self.bits, self.symmetric)

    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.scales[group], self.zeros[group]
        codes = round_to_codes(weight, scale, zero, self.bits).abs_()  # the file has no code -0, whose sign would last
        return codes, decode(codes, scale, zero)

    def layer(
        self, codes: np.ndarray, group_size: int, input_scales: np.ndarray | None, outliers: SparseOutliers | None
    ) -> QuantizedLinear:
        scales: np.ndarray | TwoLevel = by_row(self.scales, np.float16)
        zeros: np.ndarray | TwoLevel | None = None
        if self.levels is not None:
            scales, zeros = self.levels
        elif not self.symmetric:
            zeros = by_row(self.zeros, np.uint8)
        return QuantizedLinear(
            codes=codes,
            scales=scales,
            zeros=zeros,
            bits=self.bits,
            group_size=group_size,
            input_scales=input_scales,
            outliers=outliers,
        )


def round_to_codes(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes nearest to `weight`; a scale of zero, which two-level statistics can give, decodes every code alike."""
    return torch.round(weight / scale.where(scale != 0, 1.0) + zero).clamp_(0, 2**bits - 1)


def group_slices(in_features: int, group_size: int) -> Iterator[slice]:
    """The columns of each group; the last one may be short."""
    for start in range(0, in_features, group_size):
        yield slice(start, min(start + group_size, in_features))


def fit_uniform(
    weight: Tensor,
    group_size: int,
    bits: int,
    *,
    symmetric: bool,
    input_scales: Tensor | None = None,
    hessian: Tensor | None = None,
    stat_bits: int = 0,
    stat_rows: int = 16,
    rule: OutlierRule | None = None,
) -> UniformGrid:
    """The grid of every group of weight [out, in], its input scales [in] divided out.

    Without a Hessian the range is the group's smallest to largest weight, zero included. With the (damped)
    hessian [in, in] the range shrinks to where dᵀ H_g d is least, d being the rounding error of one row's
    group and H_g the group's own block of the Hessian. With a rule, weights that it calls outliers do not count.
    """

    def decoded(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return _decoded(rows, low, high, bits, symmetric)

    low, high = fit_ranges(weight, input_scales, group_size, range_fit(decoded, symmetric, hessian, rule))
    scales, zeros = range_to_grid(low, high, bits, symmetric)
    if not stat_bits:
        return UniformGrid(scales, zeros, bits, symmetric)
    stored, scales = round_two_level((high - low) / (2**bits - 1), stat_bits, stat_rows)
    if symmetric:
        return UniformGrid(scales, zeros, bits, symmetric, (stored, None))
    # A scale that was rounded down to next to nothing would give a zero that widens the range of all others in its set.
    wanted = (-low / scales.where(scales != 0, 1.0)).clamp_(0, 2**bits - 1)
    stored_zeros, zeros = round_two_level(wanted, stat_bits, stat_rows)
    return UniformGrid(scales, zeros, bits, symmetric, (stored, stored_zeros))


def fit_ranges(
    weight: Tensor,
    input_scales: Tensor | None,
    group_size: int,
    fit: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """(low, high) [G, out] of every group of weight [out, in], by `fit` on some rows [n, g] and the group's columns."""
    lows, highs = [], []
    for columns in group_slices(weight.shape[1], group_size):
        rows = max(1, MAX_ELEMENTS // (columns.stop - columns.start))
        factors = None if input_scales is None else input_scales[columns]
        parts = [
            fit(w.contiguous() if factors is None else w / factors, columns) for w in weight[:, columns].split(rows)
        ]
        lows.append(torch.cat([low for low, _ in parts]))
        highs.append(torch.cat([high for _, high in parts]))
    return torch.stack(lows), torch.stack(highs)


def range_fit(
    decoded: Callable[[Tensor, Tensor, Tensor], Tensor],
    symmetric: bool,
    hessian: Tensor | None,
    rule: OutlierRule | None,
) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]]:
    """How `fit_ranges` fits some rows [n, g] of a group: without outliers, and searched where there is a Hessian.

    decoded(rows, low, high): the rows rounded to the grid of a range.
    """

    def fit(rows: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        if rule is not None:
            rows = rule.without_outliers(rows, columns, decoded)
        low, high = full_range(rows, symmetric)
        if hessian is None:
            return low, high
        metric = hessian[columns, columns]
        return search_range(rows, low, high, lambda w, a, b: weighted_error(w, decoded(w, a, b), metric))

    return fit


def full_range(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(low, high) [rows] that hold all of weight [rows, g], and zero."""
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def search_range(
    weight: Tensor,
    low: Tensor,
    high: Tensor,
    cost: Callable[[Tensor, Tensor, Tensor], Tensor],
    least: float = SHRINK_MIN,
) -> tuple[Tensor, Tensor]:
    """The range (low, high) [rows], shrunk to where its cost is least for every row of weight [rows, g] on its own; not
    below a share of `least`.

    cost(weight, low, high): [rows]. Of few weights, it is asked for many ranges together: the interpreter costs more.
    """
    best, shrink = torch.full_like(low, torch.inf), torch.ones_like(low)
    for some in torch.linspace(1, least, SHRINK_STEPS).split(max(1, TOGETHER // max(1, weight.numel()))):
        lows, highs = torch.outer(some, low).flatten(), torch.outer(some, high).flatten()
        repeated = weight.expand(len(some), -1, -1).flatten(0, 1)  # no copy of one
        found, chosen = cost(repeated, lows, highs).view(len(some), -1).min(0)  # the first of equals: the widest range
        better = found < best
        best = torch.where(better, found, best)
        shrink = torch.where(better, some[chosen], shrink)
    return low * shrink, high * shrink


def range_to_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale as fp16 stores it, integer zero), both f32."""
    max_code = 2**bits - 1
    scale = ((high - low) / max_code).half().float().clamp_(min=FP16_TINY)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, torch.round(-low / scale).clamp_(0, max_code)


def _decoded(weight: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """weight [rows, g] rounded to the grid of the range (low, high) [rows]."""
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = (values[:, None] for values in range_to_grid(low, high, bits, symmetric))
    return decode(round_to_codes(weight, scale, zero, bits), scale, zero)


def weighted_error(weight: Tensor, decoded: Tensor, metric: Tensor) -> Tensor:
    """dᵀ metric d for each row's rounding error d: [rows]; `decoded` [rows, g] is used up."""
    error = decoded.sub_(weight)
    return (error @ metric).mul_(error).sum(1)
