"""GPTQ of many small layers of one shape at a time, as the experts of a block are: one loop over the columns of all.

What it costs to round a column hardly depends on how many rows it has, so that layers of a few hundred rows wait for
the interpreter most of the time. QMoE (arXiv 2310.16795, section 3.2) solves 16 experts together for the same reason.
Codes are those of `gptq_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from calibration.hessian import LayerStats
from qtool.errors import QuantizeError
from qtool.gptq import (
    BLOCK_SIZE,
    Factor,
    Solution,
    factorize,
    finished,
    fit_layer,
    gptq_quantize,
    groups_of,
    rtn_quantize,
)
from qtool.grid import Grid, UniformGrid
from qtool.recipe import QuantSpec
from qtool.ternary import TernaryGrid

MAX_ELEMENTS = 1 << 23
"""Weights solved at a time; more would not be faster."""
GRIDS: dict[str, type[UniformGrid] | type[TernaryGrid]] = {"int": UniformGrid, "ternary": TernaryGrid}
"""Those of which columns of different layers can be rounded at a time; layers in other formats are solved in turn."""
Given = TypeVar("Given")
Made = TypeVar("Made")


def gptq_quantize_all(
    weights: Sequence[Tensor], stats: Sequence[LayerStats], spec: QuantSpec
) -> Iterator[tuple[Solution, Factor | None]]:
    """As `factorize` and `gptq_quantize` for each weight [out, in] f32, all of one shape, with its own statistics.

    One whose Hessian cannot be factored is rounded to nearest, and has no factor: QMoE's identity.
    """
    together = max(1, MAX_ELEMENTS // weights[0].numel())
    for start in range(0, len(weights), together):
        part = slice(start, start + together)
        yield from _solve(weights[part], stats[part], spec)


def _solve(
    weights: Sequence[Tensor], stats: Sequence[LayerStats], spec: QuantSpec
) -> list[tuple[Solution, Factor | None]]:
    factors = _side_by_side(lambda layer: _factor(*layer, spec), list(zip(weights, stats, strict=True)))
    solved = iter(_factored([(w, f) for w, f in zip(weights, factors, strict=True) if f is not None], spec))
    return [
        (next(solved), factor) if factor is not None else (rtn_quantize(weight, spec, own), None)
        for weight, own, factor in zip(weights, stats, factors, strict=True)
    ]


def _factor(weight: Tensor, stats: LayerStats, spec: QuantSpec) -> Factor | None:
    try:
        return factorize(stats, [weight], spec, "an expert")
    except QuantizeError:
        return None


def _factored(layers: Sequence[tuple[Tensor, Factor]], spec: QuantSpec) -> list[Solution]:
    """The solutions of layers whose Hessians are factored."""
    kind = GRIDS.get(spec.format)
    if kind is None or spec.keeps_outliers:
        return [gptq_quantize(weight, factor, spec) for weight, factor in layers]
    grids: list[Any] = _side_by_side(lambda layer: fit_layer(*layer, spec)[0], layers)
    grid = kind.together(grids)
    codes, decoded = round_columns([w for w, _ in layers], [factor for _, factor in layers], grid, spec)

    def finish(index: int) -> Solution:
        weight, factor = layers[index]
        metric = factor.damped, factor.damping
        return finished(weight, codes[index].numpy(), decoded[index], grids[index], spec, factor, metric)

    return _side_by_side(finish, range(len(layers)))


def round_columns(
    weights: Sequence[Tensor], factors: Sequence[Factor], grid: Grid, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """(codes u8, decoded f32) [layers, out, in]: GPTQ's loop over the columns of all layers at a time.

    grid: of all groups of the first layer, then all of the second, ...
    """
    perm = torch.stack([factor.perm for factor in factors])
    chol = torch.stack([factor.hinv_chol for factor in factors])
    free = torch.stack([f.stored(w).T[f.perm] for w, f in zip(weights, factors, strict=True)])  # [layers, in, out]
    n_layers, in_features, _ = free.shape
    groups = groups_of(in_features, spec)
    n_groups = int(groups[-1]) + 1
    groups = groups[perm] + n_groups * torch.arange(n_layers)[:, None]  # [layers, in]
    codes, decoded = torch.empty(free.shape, dtype=torch.uint8), torch.empty_like(free)
    for start in range(0, in_features, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, in_features)
        block, own = free[:, start:stop].transpose(0, 1).contiguous(), chol[:, start:stop, start:stop]
        errors = torch.empty_like(block)  # [columns, layers, out]
        for j in range(stop - start):
            codes[:, start + j], rounded = grid.quantize(block[j], groups[:, start + j])
            decoded[:, start + j] = rounded
            torch.sub(block[j], rounded, out=errors[j]).div_(own[:, j, j, None])
            block[j + 1 :].addcmul_(own[:, j, j + 1 :].T[..., None], errors[j], value=-1)
        for layer in range(n_layers):  # as one layer alone does it, so that no sum depends on how many there are
            free[layer, stop:].addmm_(chol[layer, start:stop, stop:].T, errors[:, layer], alpha=-1)
    back = torch.argsort(perm, dim=1)[..., None].expand_as(free)
    return codes.gather(1, back).transpose(1, 2).contiguous(), decoded.gather(1, back).transpose(1, 2).contiguous()


def _side_by_side(make: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
    """`make` of each, a thread for each core: what a small matrix takes cannot be divided among them.

    How many there are decides nothing else: sums of one are rounded alike, whatever is beside it.
    """
    n_threads = torch.get_num_threads()
    with _one_thread(), ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(make, given))


@contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
