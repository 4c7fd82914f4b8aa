"""GPTQ of many small layers of one shape, as the experts of a block are: a core for each, and a compiled column loop.

What it costs to round a column hardly depends on how many rows it has, so that layers of a few hundred rows wait for
the interpreter most of the time, and matrices of a few hundred columns cannot be divided among cores. QMoE (arXiv
2310.16795, section 3.2) solves 16 experts together for the same reasons. Codes are those of `gptq_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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
SHARING = 16
"""Layers of one input that share a factor, at most; fewer where cores would have nothing to do."""
COMPILED = ("int", "ternary")
"""Formats whose column loop is compiled; layers in others are solved one after the other."""
Given = TypeVar("Given")
Made = TypeVar("Made")


def gptq_quantize_all(
    weights: Sequence[Tensor], stats: Sequence[LayerStats], spec: QuantSpec
) -> Iterator[tuple[Solution, float | None]]:
    """As `factorize` and `gptq_quantize` for each weight [out, in] f32, all of one shape, with its own statistics; and
    the percdamp that it took.

    One whose Hessian cannot be factored is rounded to nearest, and took none: QMoE's identity.
    """
    together = max(1, MAX_ELEMENTS // weights[0].numel())
    for start in range(0, len(weights), together):
        layers = list(zip(weights[start : start + together], stats[start : start + together], strict=True))
        inputs = _by_input(layers, spec)
        run = _side_by_side if together > 1 and spec.format in COMPILED else _in_turn
        found = run(partial(_solve_input, spec=spec), [[layers[i] for i in own] for own in inputs])
        solved = {i: one for own, made in zip(inputs, found, strict=True) for i, one in zip(own, made, strict=True)}
        yield from (solved.pop(i) for i in range(len(layers)))


def _by_input(layers: Sequence[tuple[Tensor, LayerStats]], spec: QuantSpec) -> list[list[int]]:
    """The layers that share a factor: those of one input, unless it depends on their weights."""
    shared: dict[int, list[int]] = {}
    for i, (_, stats) in enumerate(layers):
        shared.setdefault(i if spec.input_scales else id(stats), []).append(i)
    step = max(1, min(SHARING, len(layers) // torch.get_num_threads()))
    return [own[start : start + step] for own in shared.values() for start in range(0, len(own), step)]


def _solve_input(layers: Sequence[tuple[Tensor, LayerStats]], spec: QuantSpec) -> list[tuple[Solution, float | None]]:
    """Layers that share a factor, which is gone when they are solved: memory does not grow with their number."""
    factor = _factor(*layers[0], spec)
    percdamp = None if factor is None else factor.percdamp
    return [(_solve(weight, stats, factor, spec), percdamp) for weight, stats in layers]


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
