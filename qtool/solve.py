"""What is solved at a time: a pure function of weights and statistics, in this process or on another machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from calibration.hessian import LayerStats
from formats.errors import error_context
from qtool.factor import Factor, factorize
from qtool.gptq import Solution, gptq_quantize, rtn_quantize
from qtool.gptq_batch import gptq_quantize_all
from qtool.int8 import int8_quantize
from qtool.recipe import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """Linears that read one input and share its statistics, or that are alike and have each its own."""

    names: list[str]
    weights: list[Tensor]  # [out, in] f32; taken out as they are solved
    specs: list[QuantSpec]
    stats: list[LayerStats | None]  # one, or as many as there are weights
    alike: bool = False  # the latter, all of one shape and one spec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solved:
    """One of them."""

    name: str
    solution: Solution
    stats: LayerStats | None  # None on its way from another machine: who sent the work has them
    percdamp: float | None  # what it took to factor the Hessian, where one was
    seconds: float


class Solver(Protocol):
    """Where work is done."""

    workers: int
    """How much of it at a time."""
    is_elsewhere: bool
    """Whether it goes on while this process does something else."""

    def start(self, works: Iterable[Work]) -> Iterator[Solved]:
        """Every linear of every work, in their order."""
        ...


class Here:
    """Work is done when its turn comes, in this process."""

    workers = 1
    is_elsewhere = False

    def start(self, works: Iterable[Work]) -> Iterator[Solved]:
        for work in works:
            yield from solve(work)


def solve(work: Work) -> Iterator[Solved]:
    """The solutions in the order of the names; each weight is let go of when it has been solved."""
    since = time.perf_counter()
    for index, (solution, percdamp) in enumerate(_alike(work) if work.alike else _one_input(work)):
        now = time.perf_counter()
        yield Solved(
            name=work.names[index],
            solution=solution,
            stats=work.stats[index if work.alike else 0],
            percdamp=percdamp,
            seconds=now - since,
        )
        since = now


def _one_input(work: Work) -> Iterator[tuple[Solution, float | None]]:
    factor: Factor | None = None
    [stats] = work.stats
    for name, spec in zip(work.names, work.specs, strict=True):
        weight = work.weights.pop(0)
        with error_context(name):
            if spec.method == "rtn" or stats is None:
                solution = rtn_quantize(weight, spec, stats)
            elif spec.method == "int8":
                solution = int8_quantize(weight, stats, spec)
            else:
                factor = factor or factorize(stats, [weight, *work.weights], spec, name)
                solution = gptq_quantize(weight, factor, spec)
        yield solution, None if factor is None else factor.percdamp


def _alike(work: Work) -> Iterator[tuple[Solution, float | None]]:
    """Of one shape and one spec."""
    stats = [own for own in work.stats if own is not None]
    yield from gptq_quantize_all(work.weights, stats, work.specs[0])
