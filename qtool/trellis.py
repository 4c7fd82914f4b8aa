"""Trellis-coded quantization: a column of weights is one path through a trellis, found by the Viterbi algorithm.

Marcellin and Fischer (1990) with Ungerboeck's codes; QTIP (arXiv 2406.11235) brought it to language models. At equal
bits its error is about 2 dB below that of a grid: as if half a bit were free. A code's lowest bit moves the state, its
other bits choose a level in the subset that the move allows; SPEC 7.14 has the decoder.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numba
import numpy as np
import torch
from torch import Tensor

from formats.compiled import compiled, use_threads
from formats.layer import Layer, SparseOutliers, TrellisLinear, TwoLevel
from formats.trellis import SUBSETS, subsets
from qtool.grid import Columns, Grid, fit_ranges
from qtool.recipe import QuantSpec
from qtool.sizes import MAX_RUN, run_length
from qtool.statistics import FP16_TINY, by_row, round_two_level

TAIL = 5.0
WIDENING = (1.12, 1.05, 1.1, 1.15, 1.2, 1.25)
"""By bits, of the scales: a weight has taken up the errors of others by the time it is rounded, and the wider its
levels reach, the fewer outliers are kept. At equal bytes, errors of the reference model fall by 1% (2 bits) to 20%."""
TRAINING_SAMPLE = 1 << 15
TRAINING_STEPS = 12


def _extend(cost: np.ndarray, extended: np.ndarray, odd: np.ndarray, upper: np.ndarray, error: np.ndarray) -> None:
    """The cheapest way into each state [states] f32, one row further; this loop is where the time goes.

    Two states lead to a pair of states, and no others do. odd, upper: [states / 2] f32, the bits of the subset of each
    pair's first window; error: [4] f32, of the row's best level in each subset.
    """
    half = len(odd)
    low, high = cost[:half], cost[half:]
    e0, e1, e2, e3 = error[0], error[1], error[2], error[3]
    for pair in range(half):
        lower_error = e1 if odd[pair] > 0 else e0
        upper_error = e3 if odd[pair] > 0 else e2
        own = upper_error if upper[pair] > 0 else lower_error
        other = lower_error if upper[pair] > 0 else upper_error
        a, b = low[pair] + own, high[pair] + other
        c, d = low[pair] + other, high[pair] + own
        first = np.uint64(pair) << np.uint64(1)  # unsigned: an index that may be negative would not be vectorized
        extended[first] = a if a <= b else b
        extended[first | np.uint64(1)] = c if c <= d else d


_extend_compiled = compiled(_extend)


def _round_block(
    free: np.ndarray,
    lost: np.ndarray,
    shares: np.ndarray,
    limits: np.ndarray,
    scales: np.ndarray,
    subset_levels: np.ndarray,
    subsets: np.ndarray,
    run: int,
    codes: np.ndarray,
    decoded: np.ndarray,
) -> None:
    """GPTQ over the columns of a block, each run's column the cheapest path for what it has become by then.

    free, lost: [b, out] f32, changed; shares: [b, b] f32, M of these columns; limits: [b] f32, an outlier's error is
    beyond; scales: [b, out] f32; subset_levels: [4, n] f32; subsets: [states] u8, of each window whose oldest path bit
    is 0 (where it is 1, it is the other one of its pair: the last tap is in the upper parity alone); written are
    [b, out]: codes u8, decoded f32.

    Runs do not touch each other, so each goes through the whole block by itself.
    """
    n_columns, n_rows = free.shape
    n_states, n_levels = subsets.shape[0], subset_levels.shape[1]
    half = n_states // 2
    odd, upper = (subsets[::2] & 1).astype(np.float32), (subsets[::2] >> 1).astype(np.float32)
    for i in numba.prange((n_rows + run - 1) // run):
        first = i * run
        length = min(run, n_rows - first)
        rows = slice(first, first + length)
        cost = np.full((length + 1, n_states), np.float32(1e30))
        cost[0, 0] = 0
        chosen = np.empty((length, 4), np.uint8)
        error = np.empty((length, 4), np.float32)
        for j in range(n_columns):
            weight, scale, difference = free[j, rows], scales[j, rows], lost[j, rows]
            for t in range(length):
                for subset in range(4):
                    best, best_level = np.float32(np.inf), 0
                    for level in range(n_levels):
                        distance = weight[t] - scale[t] * subset_levels[subset, level]
                        distance = distance * distance
                        if distance < best:
                            best, best_level = distance, level
                    error[t, subset] = best
                    chosen[t, subset] = best_level
                _extend_compiled(cost[t], cost[t + 1], odd, upper, error[t])
            state = np.argmin(cost[length])
            for t in range(length - 1, -1, -1):
                pair, subset = state >> 1, subsets[state]
                oldest = cost[t, pair + half] + error[t, subset ^ 2] < cost[t, pair] + error[t, subset]
                subset ^= 2 * oldest
                level = chosen[t, subset]
                codes[j, first + t] = (state & 1) | (level << 1)
                decoded[j, first + t] = scale[t] * subset_levels[subset, level]
                state = pair | (oldest * half)
            for t in range(length):
                rounded = decoded[j, first + t]
                difference[t] -= weight[t] if abs(weight[t] - rounded) > limits[j] else rounded
            for k in range(j + 1, n_columns):
                share, later = shares[j, k], free[k, rows]
                for t in range(length):
                    later[t] += share * difference[t]


_round_block_compiled = compiled(_round_block, parallel=True)


@dataclass(frozen=True, eq=False)
class TrellisGrid(Grid):
    """scale * levels[subset of the path, code]: scales [G, out] f32 as stored, levels [2**(bits + 1)] f32."""

    scales: Tensor
    levels: Tensor
    bits: int
    memory: int
    run: int
    stored: TwoLevel | None = None

    @property
    def row_step(self) -> int:  # type: ignore[override]
        return self.run

    def rows(self, stripe: slice) -> TrellisGrid:
        return replace(self, scales=self.scales[:, stripe], stored=None)

    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        free = weight.reshape(-1, weight.shape[-1]).contiguous().clone()
        columns = Columns.of(free, torch.eye(len(free)), torch.as_tensor(group).reshape(-1).expand(len(free)))
        self.round_block(columns, slice(0, len(free)))
        return columns.codes.view(weight.shape), columns.decoded.view(weight.shape)

    def round_block(self, columns: Columns, own: slice, limits: Tensor | None = None) -> None:
        block = columns.block(own)
        limits = torch.full((len(block.free),), torch.inf) if limits is None else limits
        use_threads(torch.get_num_threads())
        _round_block_compiled(
            block.free.numpy(),
            block.lost.numpy(),
            block.shares.contiguous().numpy(),
            limits.numpy(),
            self.scales[block.groups].numpy(),
            np.ascontiguousarray(self.levels.numpy().reshape(-1, 4).T),
            SUBSETS[self.memory][: 1 << self.memory],
            self.run,
            block.codes.numpy(),
            block.decoded.numpy(),
        )

    def layer(
        self, codes: np.ndarray, group_size: int, input_scales: np.ndarray | None, outliers: SparseOutliers | None
    ) -> Layer:
        return TrellisLinear(
            codes=codes,
            scales=by_row(self.scales, np.float16) if self.stored is None else self.stored,
            levels=self.levels.numpy().astype(np.float16),
            bits=self.bits,
            memory=self.memory,
            run=self.run,
            group_size=group_size,
            input_scales=input_scales,
            outliers=outliers,
        )


@functools.cache
def gaussian_levels(bits: int, memory: int) -> Tensor:
    """Levels [2**(bits + 1)] f32 with fp16 values for units of a normal distribution, by Lloyd's algorithm."""
    n = 2 << bits
    units = torch.randn(1, TRAINING_SAMPLE, generator=torch.Generator().manual_seed(0))
    levels: Tensor = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float() * 1.1
    group = torch.zeros(1, dtype=torch.long)
    for _ in range(TRAINING_STEPS):
        grid = TrellisGrid(torch.ones_like(units), levels, bits, memory, MAX_RUN)
        codes, _ = grid.quantize(units, group)
        levels = _mean_levels(grid, codes.numpy().T, units.numpy().ravel())
    return levels


def _mean_levels(grid: TrellisGrid, codes: np.ndarray, units: np.ndarray) -> Tensor:
    """Each level where the mean of its units [n] is, by Lloyd's rule; codes [n, 1]. The distribution is symmetric."""
    index = (subsets(codes & np.uint8(1), grid.memory, grid.run) + 4 * (codes >> 1)).ravel()
    n = len(grid.levels)
    count, total = np.bincount(index, minlength=n), np.bincount(index, units, n)
    count, total = count + count[::-1], total - total[::-1]
    mean = np.where(count > 0, total / np.maximum(count, 1), grid.levels.numpy())
    return torch.from_numpy(mean.astype(np.float16).astype(np.float32))


def fit_trellis(weight: Tensor, spec: QuantSpec, *, input_scales: Tensor | None = None) -> TrellisGrid:
    """The grid of weight [out, in], its input scales [in] divided out: each group scaled by its root mean square."""

    def spread(rows: Tensor, _columns: slice) -> tuple[Tensor, Tensor]:
        squares = rows.square()
        usual = squares <= TAIL**2 * squares.mean(1, keepdim=True)  # the few beyond would widen it for all
        scale = (squares * usual).sum(1).div_(usual.sum(1)).sqrt_().mul_(widening)
        return scale, scale

    # Rounded to nearest, a weight takes up no errors and leaves no outliers: the spread itself is best.
    widening = WIDENING[spec.bits - 1] if spec.method == "gptq" else 1.0

    scales, _ = fit_ranges(weight, input_scales, spec.groups_of(weight.shape[1]), spread)
    stored = None
    if spec.stat_bits:
        stored, scales = round_two_level(scales, spec.stat_bits, spec.stat_rows)
    else:
        scales = scales.half().float().clamp(min=FP16_TINY)
    return TrellisGrid(
        scales=scales,
        levels=gaussian_levels(spec.bits, spec.memory),
        bits=spec.bits,
        memory=spec.memory,
        run=run_length(weight.shape[0]),
        stored=stored,
    )
