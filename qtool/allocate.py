"""Spread a budget of bytes over layers: one candidate each, the sum of their losses as small as it can be.

A multiple-choice knapsack. Sections are padded to 256 bytes, so its weights are small integers: where the table of
dynamic programming is at most MAX_CELLS, it finds the optimum. Beyond, the optimum of the Lagrangian relaxation is
filled up greedily, and the gap to its bound, which no allocation can beat, is stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_Sizes: TypeAlias = npt.NDArray[np.int64]
_Losses: TypeAlias = npt.NDArray[np.float64]
_Choice: TypeAlias = npt.NDArray[np.intp]
MAX_CELLS = 1 << 26
"""Bytes of the exact method's table: for each layer a choice for every number of units left."""
DUAL_STEPS = 60


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a layer, or layers that are stored alike."""

    n_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The candidate of every layer, and how far the sum of losses may be from the least one."""

    choice: tuple[int, ...]
    n_bytes: int
    loss: float
    gap: float  # (loss - bound) / loss; 0 where the optimum is certain


def allocate(layers: Sequence[Sequence[Candidate]], budget_bytes: int, unit_bytes: int = 256) -> Allocation | None:
    """The least sum of losses in at most `budget_bytes`; None when even the smallest candidates take more.

    Every candidate's size is a multiple of `unit_bytes`.
    """
    least = sum(min(c.n_bytes for c in layer) for layer in layers)
    if least > budget_bytes:
        return None
    most = sum(max(c.n_bytes for c in layer) for layer in layers)  # more is of no use
    slack = (min(budget_bytes, most) - least) // unit_bytes
    if len(layers) * (slack + 1) <= MAX_CELLS:
        choice, bound = _exact(layers, slack, unit_bytes), None
    else:
        choice, bound = _relaxed(layers, budget_bytes)
    loss = math.fsum(layer[i].loss for layer, i in zip(layers, choice, strict=True))
    gap = 0.0 if bound is None or loss <= 0 else max(0.0, (loss - bound) / loss)
    return Allocation(tuple(choice), sum(layer[i].n_bytes for layer, i in zip(layers, choice, strict=True)), loss, gap)


def _exact(layers: Sequence[Sequence[Candidate]], slack: int, unit_bytes: int) -> list[int]:
    """Dynamic programming over the units beyond the smallest candidates."""
    best: npt.NDArray[np.float64] = np.zeros(slack + 1)
    picks = []
    for layer in layers:
        least = min(c.n_bytes for c in layer)
        following = np.full(slack + 1, np.inf)
        pick = np.zeros(slack + 1, np.uint8)
        for index, candidate in enumerate(layer):
            extra = (candidate.n_bytes - least) // unit_bytes
            if extra <= slack:
                total = best[: slack + 1 - extra] + candidate.loss
                better = total < following[extra:]
                following[extra:][better] = total[better]
                pick[extra:][better] = index
        best = following
        picks.append(pick)
    left, choice = slack, []
    for layer, pick in zip(reversed(layers), reversed(picks), strict=True):
        index = int(pick[left])
        choice.append(index)
        left -= (layer[index].n_bytes - min(c.n_bytes for c in layer)) // unit_bytes
    return choice[::-1]


def _relaxed(layers: Sequence[Sequence[Candidate]], budget: int) -> tuple[list[int], float]:
    """(a choice within the budget, a bound that no choice within it can beat)."""
    n_bytes, losses = _tables(layers)
    rows = np.arange(len(layers))
    low, high, bound = 0.0, max(c.loss for layer in layers for c in layer) + 1.0, 0.0
    choice = _cheapest(n_bytes, losses, high)
    for _ in range(DUAL_STEPS):
        price = (low * high) ** 0.5 if low else high / 2**20
        trial = _cheapest(n_bytes, losses, price)
        used = int(n_bytes[rows, trial].sum())
        bound = max(bound, math.fsum(losses[rows, trial]) + price * (used - budget))
        if used > budget:
            low = price
        else:
            high, choice = price, trial
    return _filled(n_bytes, losses, choice, budget), bound


def _tables(layers: Sequence[Sequence[Candidate]]) -> tuple[_Sizes, _Losses]:
    """Bytes i64 and loss f64 of every candidate [layers, most candidates]; where a layer has fewer, the loss is ∞."""
    shape = len(layers), max(map(len, layers))
    n_bytes, losses = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for at, layer in enumerate(layers):
        n_bytes[at, : len(layer)] = [c.n_bytes for c in layer]
        losses[at, : len(layer)] = [c.loss for c in layer]
    return n_bytes, losses


def _cheapest(n_bytes: _Sizes, losses: _Losses, price: float) -> _Choice:
    """Every layer's best candidate when a byte costs `price`."""
    choice: _Choice = (losses + price * n_bytes).argmin(1)
    return choice


def _filled(n_bytes: _Sizes, losses: _Losses, choice: _Choice, budget: int) -> list[int]:
    """`choice` with what is left of the budget spent on the upgrades that save most for each byte."""
    rows, choice = np.arange(len(choice)), choice.copy()
    while True:
        now = n_bytes[rows, choice]
        extra, saved = n_bytes - now[:, None], losses[rows, choice][:, None] - losses
        rate = np.where((saved > 0) & (extra <= budget - now.sum()), saved / np.maximum(extra, 1), -1.0)
        layer, index = np.unravel_index(rate.argmax(), rate.shape)
        if rate[layer, index] < 0:
            return [int(i) for i in choice]
        choice[layer] = index
