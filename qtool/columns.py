"""GPTQ's loop over the columns of a block, compiled: for layers so small that the interpreter takes most of the time.

`Grid.round_block` is the reference, and nothing here may differ from it in a single bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from formats.compiled import compiled
from formats.layer import Layer, SparseOutliers
from qtool.grid import Columns, Grid, UniformGrid
from qtool.ternary import TernaryGrid

STRIPE = 256
"""Rows at a time: a block of them and what it lost stay in the cache of a core."""


LOOP = {"nogil": True, "error_model": "numpy"}
"""Divisions as in torch: by zero they give infinity."""


def _round_uniform(
    column: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: np.ndarray, codes: np.ndarray, decoded: np.ndarray
) -> None:
    """`UniformGrid.quantize` of a column [rows]; top: its largest code."""
    for t in range(len(column)):
        code = column[t] / (scale[t] if scale[t] != 0 else np.float32(1)) + zero[t]
        code = np.rint(min(max(code, np.float32(0)), top))
        codes[t] = np.uint8(code)
        decoded[t] = scale[t] * (code - zero[t])


def _round_ternary(
    column: np.ndarray, low: np.ndarray, high: np.ndarray, codes: np.ndarray, decoded: np.ndarray
) -> None:
    """`TernaryGrid.quantize` of a column [rows]."""
    half = np.float32(0.5)
    for t in range(len(column)):
        is_low, is_high = column[t] < low[t] * half, column[t] > high[t] * half
        codes[t] = np.uint8(1) + np.uint8(is_high) - np.uint8(is_low)
        decoded[t] = low[t] if is_low else (high[t] if is_high else np.float32(0))


def _make_up(free: np.ndarray, shares: np.ndarray, j: int, stop: int, rows: slice, lost: np.ndarray) -> None:
    """Of some rows of free [in, out], the columns behind j up to `stop`, plus their shares of what j lost, [rows].

    Rounded once where the machine can, as in torch's addcmul_.
    """
    for k in range(j + 1, stop):
        share, later = shares[j, k], free[k, rows]  # a part of one row, which the compiler knows to be contiguous
        for t in range(len(lost)):
            later[t] += share * lost[t]


_round_uniform_compiled = compiled(_round_uniform, **LOOP)
_round_ternary_compiled = compiled(_round_ternary, **LOOP)
_make_up_compiled = compiled(_make_up, fastmath={"contract"}, **LOOP)


def _round_block(
    start: int,
    stop: int,
    free: np.ndarray,
    lost: np.ndarray,
    shares: np.ndarray,
    limits: np.ndarray,
    groups: np.ndarray,
    is_ternary: bool,
    lower: np.ndarray,
    upper: np.ndarray,
    top: np.ndarray,
    codes: np.ndarray,
    decoded: np.ndarray,
) -> None:
    """`Grid.round_block` of the columns from start to `stop`, b of them; limits: [b] f32; of the grid (lower, upper)
    [G, rows] f32: low and high, or scales and zeros, and the largest code, a f32; the others as in `Columns`.

    Rows do not touch each other, so each stripe of them goes through the whole block by itself.
    """
    n_rows = free.shape[1]
    for first in range(0, n_rows, STRIPE):
        rows = slice(first, min(first + STRIPE, n_rows))
        for j in range(start, stop):
            column, rounded, difference = free[j, rows], decoded[j, rows], lost[j, rows]
            a, b = lower[groups[j], rows], upper[groups[j], rows]
            if is_ternary:
                _round_ternary_compiled(column, a, b, codes[j, rows], rounded)
            else:
                _round_uniform_compiled(column, a, b, top, codes[j, rows], rounded)
            limit = limits[j - start]
            for t in range(len(column)):
                difference[t] -= column[t] if abs(column[t] - rounded[t]) > limit else rounded[t]
            _make_up_compiled(free, shares, j, stop, rows, difference)


_round_block_compiled = compiled(_round_block, **LOOP)


@dataclass(frozen=True, eq=False)
class CompiledGrid(Grid):
    """A grid whose blocks of columns are rounded by compiled code."""

    grid: UniformGrid | TernaryGrid

    def rows(self, stripe: slice) -> CompiledGrid:
        return CompiledGrid(self.grid.rows(stripe))

    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        return self.grid.quantize(weight, group)

    def round_block(self, columns: Columns, own: slice, limits: Tensor | None = None) -> None:
        grid = self.grid
        if isinstance(grid, TernaryGrid):
            lower, upper, top = grid.low, grid.high, 2
        else:
            lower, upper, top = grid.scales, grid.zeros, 2**grid.bits - 1
        _round_block_compiled(
            own.start,
            own.stop,
            columns.free.numpy(),
            columns.lost.numpy(),
            columns.shares.numpy(),
            np.full(own.stop - own.start, np.inf, np.float32) if limits is None else limits.numpy(),
            columns.groups.numpy(),
            isinstance(grid, TernaryGrid),
            lower.numpy(),
            upper.numpy(),
            np.float32(top),
            columns.codes.numpy(),
            columns.decoded.numpy(),
        )

    def layer(
        self, codes: np.ndarray, group_size: int, input_scales: np.ndarray | None, outliers: SparseOutliers | None
    ) -> Layer:
        return self.grid.layer(codes, group_size, input_scales, outliers)
