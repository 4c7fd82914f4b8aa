"""GPTQ of many small layers of one shape, as the experts of a block are: a core for each, and a compiled column loop.

What it costs to round a column hardly depends on how many rows it has, so that layers of a few hundred rows wait for
the interpreter most of the time, and matrices of a few hundred columns cannot be divided among cores. QMoE (arXiv
2310.16795, section 3.2) solves 16 experts together for the same reasons. Codes are those of `gptq_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from calibration.hessian import LayerStats
from qtool.errors import QuantizeError
from qtool.factor import Factor, factorize
from qtool.gptq import Solution, fit_layer, rtn_quantize, solve_columns
from qtool.grid import UniformGrid
from qtool.recipe import QuantSpec
from qtool.ternary import TernaryGrid

MAX_ELEMENTS = 1 << 23
"""Weights solved at a time: what is made of them is in memory together. A larger layer has all cores to itself."""
COMPILED = ("int", "ternary")
"""Formats whose column loop is compiled; layers in others are solved one after the other."""
Given = TypeVar("Given")
Made = TypeVar("Made")


def gptq_quantize_all(
    weights: Sequence[Tensor], stats: Sequence[LayerStats], spec: QuantSpec
) -> Iterator[tuple[Solution, Factor | None]]:
    """As `factorize` and `gptq_quantize` for each weight [out, in] f32, all of one shape, with its own statistics.

    One whose Hessian cannot be factored is rounded to nearest, and has no factor: QMoE's identity.
    """
    together = max(1, MAX_ELEMENTS // weights[0].numel())
    solve_all = _side_by_side if together > 1 and spec.format in COMPILED else _in_turn
    for start in range(0, len(weights), together):
        part = slice(start, start + together)
        layers = list(zip(weights[part], stats[part], strict=True))
        factors = _factors(layers, spec, together=together > 1)
        factored = [(*layer, factor) for layer, factor in zip(layers, factors, strict=True)]
        yield from zip(solve_all(lambda layer: _solve(*layer, spec), factored), factors, strict=True)


def _factors(layers: Sequence[tuple[Tensor, LayerStats]], spec: QuantSpec, *, together: bool) -> list[Factor | None]:
    """Of each layer; one for all that read one input, unless it depends on their weights."""
    keys = [i if spec.input_scales else id(stats) for i, (_, stats) in enumerate(layers)]
    distinct = dict(zip(keys, layers, strict=True))
    run = _side_by_side if together else _in_turn
    made = dict(zip(distinct, run(lambda layer: _factor(*layer, spec), list(distinct.values())), strict=True))
    return [made[key] for key in keys]


def _factor(weight: Tensor, stats: LayerStats, spec: QuantSpec) -> Factor | None:
    try:
        return factorize(stats, [weight], spec, "an expert")
    except QuantizeError:
        return None


def _solve(weight: Tensor, stats: LayerStats, factor: Factor | None, spec: QuantSpec) -> Solution:
    if factor is None:
        return rtn_quantize(weight, spec, stats)
    grid, rule = fit_layer(weight, factor, spec)
    if isinstance(grid, UniformGrid | TernaryGrid):
        from qtool.columns import CompiledGrid  # brings in a compiler

        grid = CompiledGrid(grid)
    return solve_columns(weight, grid, rule, factor, spec)


def _in_turn(make: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
    return [make(one) for one in given]


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
