"""STAGE 4, isolate outliers: SpQR's decision, called from the fit of a grid and from the solver's column loop.

SpQR (arXiv 2306.03078) keeps a weight in 16 bits when its rounding error, times what the error costs, is above a
threshold that is relative to the layer: τ · mean over columns j of Var(W[:, j]) / U_jj², U the Cholesky factor of the
inverse Hessian; 1 / U_jj² is the pivot D_jj of our factor. While a grid is fitted, a weight counts as an outlier when
the group's error falls by more than the threshold as soon as the group does without it (leave one out).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from formats.layer import SparseOutliers

FP16_MAX = 65504.0
MIN_THRESHOLD, MAX_THRESHOLD = 1e-6, 1e6
AIM, ENOUGH = 0.97, 0.94  # of a rate: what a step of the search aims at, and what ends it


@dataclass(frozen=True, slots=True, eq=False)
class OutlierRule:
    """Which weights of a layer are kept: those whose error costs more than `threshold`."""

    threshold: float
    cost: Tensor  # [in] f32: D_jj of every column, in the layer's own order

    def without_outliers(
        self, weight: Tensor, columns: slice, decoded: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """weight [rows, g] with every likely outlier replaced by the mean of its row's other weights.

        decoded(weight, low, high): the weights rounded to the grid of a range [rows].
        """
        gain = leave_one_out(weight, self.cost[columns], decoded)
        likely = gain > self.threshold
        others = weight.masked_fill(likely, 0).sum(1) / (~likely).sum(1).clamp(min=1)
        return torch.where(likely, others[:, None], weight)

    def limits(self, pivots: Tensor) -> Tensor:
        """The error beyond which a weight of each column is kept; pivots: [b], D_jj, error² · D_jj being its cost."""
        return (self.threshold / pivots).sqrt_()


def kept_values(residual: Tensor, limits: Tensor) -> Tensor:
    """What is added to decoded weights: their residual [b, rows] as fp16 holds it, or 0; limits: [b]."""
    kept = torch.where(residual.abs() > limits[:, None], residual, 0.0)
    return kept.clamp_(-FP16_MAX, FP16_MAX).half().float()


def leave_one_out(weight: Tensor, cost: Tensor, decoded: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """How much the error of a row's group falls when it does without each of its weights: [rows, g].

    A grid follows the smallest and the largest weight. So leaving out any other one changes no grid, and saves that
    weight's own error; only the two at the ends need a fit of their own.
    """
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    own = (decoded(weight, low, high) - weight).square_().mul_(cost)
    total, gain = own.sum(1), own.clone()
    for extreme in (weight.argmin(1), weight.argmax(1)):
        at = extreme[:, None]
        rest = weight.scatter(1, at, 0.0)  # zero is in every range
        error = (decoded(rest, rest.amin(1).clamp(max=0), rest.amax(1).clamp(min=0)) - rest).square_().mul_(cost)
        error.scatter_(1, at, 0.0)
        gain.scatter_(1, at, (total - error.sum(1))[:, None])
    return gain


def relative_threshold(weight: Tensor, cost: Tensor) -> float:
    """The unit of SpQR's threshold for weight [out, in]: the mean over columns of variance times cost [in].

    Infinite where no column varies, as with a single row: a share of nothing would make every weight an outlier.
    """
    return float((weight.var(0, correction=0) * cost).mean()) or math.inf


def threshold_of_rate(rate: float, share: Callable[[float], float]) -> float:
    """A threshold at which `share`, which falls as it rises, is at most `rate` and not far below it.

    Less than a factor of 1.05 above the least such threshold, or with ENOUGH of the rate. Not below MIN_THRESHOLD, nor
    much above MAX_THRESHOLD. Each share is a solve, so steps go where a power law through both ends has the rate.
    """
    share = functools.cache(share)
    high = 1 / 16
    while share(high) > rate and high < MAX_THRESHOLD:
        high *= 4
    while share(low := high / 4) <= rate and low > MIN_THRESHOLD:
        high = low
    while high / low > 1.05 and share(high) < ENOUGH * rate:
        at, many, few = 0.5, share(low), share(high)
        if many > rate > few > 0:
            at = min(max(math.log(many / (AIM * rate)) / math.log(many / few), 0.2), 0.8)
        middle = low * (high / low) ** at
        low, high = (middle, high) if share(middle) > rate else (low, middle)
    return high


@dataclass(slots=True)
class OutlierList:
    """The kept values of a layer as they are found: a stripe of rows after the other, column by column."""

    _rows: list[Tensor] = field(default_factory=list)
    _columns: list[Tensor] = field(default_factory=list)
    _values: list[Tensor] = field(default_factory=list)

    def add(self, first_row: int, column: int, kept: Tensor) -> None:
        """The values of a column from `first_row` on; those that are 0 are none."""
        rows = kept.nonzero().flatten()
        self._rows.append(rows + first_row)
        self._columns.append(torch.full_like(rows, column))
        self._values.append(kept[rows])

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def cut(self, at_most: int, cost: Tensor) -> None:
        """Drop those that save least beyond so many; cost: [in], as the rule's."""
        if len(self) > at_most:
            rows, columns, values = self._coordinates()
            best = (values.square() * cost[columns]).argsort(descending=True, stable=True)[:at_most]
            self._rows, self._columns, self._values = [rows[best]], [columns[best]], [values[best]]

    def threshold_of(self, n: int, cost: Tensor) -> float:
        """The threshold that `n` of them are above; cost: [in], as the rule's."""
        _, columns, values = self._coordinates()
        return float((values.square() * cost[columns]).sort(descending=True).values[n])

    def add_to(self, decoded: Tensor) -> None:
        """Add them to the decoded weight [out, in], as a reader does."""
        if len(self):
            rows, columns, values = self._coordinates()
            decoded[rows, columns] += values

    def sparse(self, shape: tuple[int, int]) -> SparseOutliers | None:
        """In the order of the file; None when there are none."""
        if not len(self):
            return None
        rows, columns, values = self._coordinates()
        order = torch.argsort(rows * shape[1] + columns)
        ordered = columns[order].numpy()
        counts = torch.bincount(rows, minlength=shape[0])
        return SparseOutliers(
            row_ptr=np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.uint32),
            columns=ordered.astype(np.uint16) if shape[1] <= 1 << 16 else ordered.astype(np.uint32),
            values=values[order].numpy().astype(np.float16),
        )

    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self._rows), torch.cat(self._columns), torch.cat(self._values)
