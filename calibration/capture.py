"""Runs a block over the calibration set and collects the Hessian of every linear's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calibration.errors import CalibrationError
from calibration.hessian import HessianAccumulator, LayerStats

MAX_DROPPED_SHARE = 0.01
"""Of the tokens that reach a layer: a few that overflow are the sample's, more are the model's."""


class _BlockDone(Exception):
    """Every input has been seen: what is left of the block's forward would compute nothing we keep."""


class HessianCapture:
    """Forward pre-hooks on `linears`; those that are handed the very same tensor share one Hessian."""

    def __init__(self, linears: dict[str, nn.Module], *, unknown_is_nan: bool = False) -> None:
        """unknown_is_nan: what is not known yet is NaN; linears that read nothing else are `late`, and left out."""
        self._unknown_is_nan = unknown_is_nan
        self.late: set[str] = set()
        self._linears = linears
        self._leader: dict[str, str] = {}  # linear -> the linear whose accumulator it shares
        self._accumulators: dict[str, HessianAccumulator] = {}
        self._new: dict[str, Tensor] = {}  # leaders first seen in this forward, and what they saw
        self._called: list[str] = []
        self._last: str | None = None

    def run(self, forward: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> dict[str, LayerStats]:
        """Name -> statistics after `forward` over all batches; a linear that saw no token is left out."""
        with self._hooked():
            for batch in batches:
                self._forward(forward, batch)
        return self.results()

    def outputs(self, forward: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The output of each batch, where it is wanted too; what was seen of them is in `results`."""
        with self._hooked():
            for batch in batches:
                yield forward(batch)
                self._new.clear()
                self._called.clear()

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = [m.register_forward_pre_hook(self._hook(name)) for name, m in self._linears.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _forward(self, forward: Callable[[Tensor], Any], batch: Tensor) -> None:
        self._called.clear()
        try:
            forward(batch)
        except _BlockDone:
            return
        finally:
            self._new.clear()
        # Only a block that calls each linear once has a "last" one; experts may come and go.
        if sorted(self._called) == sorted(self._linears):
            self._last = self._called[-1]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if self._unknown_is_nan and torch.isnan(x).all():
                self.late.add(name)
                return
            self._called.append(name)
            if name not in self._leader:
                self._assign(name, x)
            if self._leader[name] == name:
                self._accumulators[name].add(x)
            if name == self._last:
                raise _BlockDone

        return hook

    def _assign(self, name: str, x: Tensor) -> None:
        for leader, seen in self._new.items():
            if seen is x:
                self._leader[name] = leader
                return
        self._leader[name] = name
        self._accumulators[name] = HessianAccumulator(x.shape[-1])
        self._new[name] = x

    def results(self) -> dict[str, LayerStats]:
        """Name -> statistics of what was seen; a linear that saw no token is left out. Ends the accumulation."""
        stats = {}
        for name, accumulator in self._accumulators.items():
            stats[name] = accumulator.result()
            check_finite(name, stats[name])
        return {name: stats[self._leader[name]] for name in self._linears if name in self._leader}


def check_finite(name: str, stats: LayerStats) -> None:
    """CalibrationError where more than `MAX_DROPPED_SHARE` of a layer's tokens overflow."""
    total = stats.n_tokens + stats.n_dropped
    if stats.n_dropped > MAX_DROPPED_SHARE * total:
        raise CalibrationError(
            f"{name}: {stats.n_dropped} of {total} tokens reach this layer with NaN or infinite activations, "
            f"more than {MAX_DROPPED_SHARE:.0%}; the model overflows"
        )
    if not torch.isfinite(stats.hessian).all():
        raise CalibrationError(f"{name}: the activations that reach this layer overflow when squared")
