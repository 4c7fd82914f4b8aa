"""A block's mixture of experts over the whole calibration set: its tokens lie on disk, and few experts in memory.

What QMoE calls a list buffer (arXiv 2310.16795, section 3.2): one buffer holds what the mixture reads of all tokens.
An expert's tokens are gathered from it, and what the expert makes of them is added to a second one, so that memory
grows neither with the experts nor with the tokens. The block itself is run twice around it: up to the mixture, and
once more with what the mixture has given.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calibration.capture import check_finite
from calibration.hessian import HessianAccumulator, LayerStats
from formats.experts import SeparateExperts, expert_with
from formats.skeleton import split_name
from qtool.checkpoint import find_tensor
from qtool.errors import naming
from qtool.model import BlockwiseModel, instead_of
from qtool.states import (
    EXPERT_FILES,
    TOKENS_PER_BATCH,
    HiddenStates,
    advance,
    calibrate,
    calibrate_late,
)

INPUTS_FILE, OUTPUTS_FILE = EXPERT_FILES
MAX_SHARE = 4
"""Times the mean: so many tokens of an expert count at most, as in QMoE; a popular one would take all the time."""
BATCH_ELEMENTS = 1 << 24
"""Weights and statistics of the experts that are in memory together, unless one alone has more."""

Handle = Callable[[list[str], dict[str, LayerStats]], None]
"""Is given the names of tensors that are in memory and the statistics of their linears; leaves the tensors as those
that the experts are to give their outputs with."""


class _Reached(Exception):
    """The mixture was called: what lies behind it is not wanted now."""


class Mixture:
    """The experts of one block."""

    def __init__(self, model: BlockwiseModel, index: int, name: str, n_batches: int = 1) -> None:
        """n_batches: of `BATCH_ELEMENTS`, in memory together."""
        self.model, self.index, self.name = model, index, name
        module = model.skeleton.get_submodule(name)
        assert isinstance(module, SeparateExperts)
        self.experts = module
        self._names: dict[int, list[str]] = {}
        for tensor in model.tensor_names(f"{name}."):
            number = expert_with(model.skeleton, tensor)
            if number is not None:
                self._names.setdefault(number, []).append(tensor)
        self._in_memory = n_batches * max(1, BATCH_ELEMENTS // max(map(self._elements, self._names), default=1))

    def _elements(self, number: int) -> int:
        """Of an expert: its tensors, and the statistics of its linears."""
        shapes = [find_tensor(self.model.skeleton, name).shape for name in self._names[number]]
        return sum(math.prod(shape) + (shape[1] ** 2 if len(shape) == 2 else 0) for shape in shapes)

    @contextmanager
    def in_memory(self, numbers: Iterable[int]) -> Iterator[list[str]]:
        """The tensors of some experts, and their names."""
        names = [name for number in numbers for name in self._names[number]]
        with self.model.materialised(names):
            yield names

    def visit(self, handle: Handle) -> None:
        """Handle all experts, a few at a time, without statistics."""
        for numbers in self.batches(range(self.experts.n_experts)):
            with self.in_memory(numbers) as names:
                handle(names, {})

    def batches(self, numbers: Iterable[int]) -> Iterator[list[int]]:
        """The numbers of experts that are in memory together."""
        numbers = list(numbers)
        for start in range(0, len(numbers), self._in_memory):
            yield numbers[start : start + self._in_memory]

    def by_layer(self, number: int, up: LayerStats, down: LayerStats) -> dict[str, LayerStats]:
        """An expert's statistics by the names of its linears."""
        layers = dict.fromkeys(split_name(name)[0] for name in self._names[number])
        return {layer: down if split_name(layer)[1] == self.experts.down_name else up for layer in layers}


class HeldStates(NamedTuple):
    """Hidden states in memory, read as `HiddenStates` are; a folder for what a mixture reads and gives."""

    folder: Path
    batches: list[Tensor]

    def read(self, step: int) -> Iterator[Tensor]:
        return iter(self.batches)


class RoutedTokens:
    """What a mixture reads of the calibration set, which experts each token goes to, and what they give."""

    def __init__(self, mixture: Mixture, states: HiddenStates | HeldStates, *, pools: bool = True) -> None:
        """Run the block, but for its experts, up to the mixture, and keep what that reads; `pools`: for `visit`."""
        self.mixture, self._folder = mixture, states.folder
        self._pool: HessianAccumulator | None = None
        chosen: list[Tensor] = []
        weights: list[Tensor] = []

        def keep(hidden: Tensor, *routes: Tensor, **named: Tensor) -> Tensor:
            x = hidden.float().contiguous()
            if pools:
                self._pool = self._pool or HessianAccumulator(x.shape[-1])
                self._pool.add(x)
            file.write(x.numpy().data)
            routed = [*routes, *named.values()]
            chosen.append(mixture.experts.chosen(routed[0]).int())
            weights.append(routed[1].float())
            raise _Reached

        path = self._folder / INPUTS_FILE
        with naming(path), open(path, "wb") as file, instead_of(mixture.experts, keep):
            for batch in states.read(mixture.index):
                try:
                    mixture.model.run(mixture.index, batch)
                except _Reached:
                    continue
        self._route(torch.cat(chosen), torch.cat(weights))
        self._inputs = self._map(INPUTS_FILE, "r")
        self._reserve(OUTPUTS_FILE)
        self._outputs = self._map(OUTPUTS_FILE, "r+")

    def _route(self, chosen: Tensor, weights: Tensor) -> None:
        rows, slots, self.counts = self.mixture.experts.routed(chosen)
        self._rows = rows.split(self.counts)
        self._weights = weights.reshape(-1)[slots].split(self.counts)
        self._n_tokens = len(chosen)

    def _reserve(self, name: str) -> None:
        """A file of zeros, as large as the inputs: a full disk is an error now, where the map would crash."""
        path = self._folder / name
        with naming(path), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (self._folder / INPUTS_FILE).stat().st_size)

    def _map(self, name: str, mode: Any) -> np.memmap[Any, Any]:
        path = self._folder / name
        width = (self._folder / INPUTS_FILE).stat().st_size // (4 * self._n_tokens)
        with naming(path):
            return np.memmap(path, np.float32, mode, shape=(self._n_tokens, width))

    def visit(self, min_tokens: int, handle: Handle) -> list[int]:
        """Calibrate the experts, a few at a time, and add up what they give once they have been handled.

        Experts that saw fewer than `min_tokens` tokens, which are returned, are handled last, with the statistics of
        all experts together.
        """
        mixture, numbers = self.mixture, range(self.mixture.experts.n_experts)
        assert self._pool is not None
        few = [number for number in numbers if self.counts[number] < max(min_tokens, 1)]
        pooled = _Pool(self._pool.result())
        for batch in mixture.batches(number for number in numbers if number not in set(few)):
            with mixture.in_memory(batch) as names:
                stats: dict[str, LayerStats] = {}
                for number in batch:
                    up, down = self._statistics(number)
                    if few:
                        pooled.add(down)
                    stats |= mixture.by_layer(number, up, down)
                handle(names, stats)
                self._add_outputs(batch)
        for batch in mixture.batches(number for number in few if self.counts[number]):
            with mixture.in_memory(batch):
                for number in batch:
                    pooled.add(self._statistics(number)[1])
        shared = pooled.up, pooled.down
        for batch in mixture.batches(few):
            with mixture.in_memory(batch) as names:
                handle(names, {k: v for number in batch for k, v in mixture.by_layer(number, *shared).items()})
                self._add_outputs(batch)
        return few

    def give(self) -> None:
        """Add up what the experts give as they are stored, a few in memory at a time."""
        for batch in self.mixture.batches(number for number, count in enumerate(self.counts) if count):
            with self.mixture.in_memory(batch):
                self._add_outputs(batch)

    def _statistics(self, number: int) -> tuple[LayerStats, LayerStats]:
        """Of what both linears of an expert read, which has its weights; at most `MAX_SHARE` of its tokens count."""
        rows = self._rows[number]
        at_most = max(1, MAX_SHARE * sum(self.counts) // len(self.counts))
        if len(rows) > at_most:
            rows = rows[torch.linspace(0, len(rows) - 1, at_most).long()]
        experts = self.mixture.experts
        down_proj: Any = experts.expert(number).get_submodule(experts.down_name)
        up, down = HessianAccumulator(self._inputs.shape[1]), HessianAccumulator(down_proj.in_features)
        for part in rows.split(TOKENS_PER_BATCH):
            x = self._gather(part)
            up.add(x)
            down.add(experts.between(number, x))
        self._drop_pages()
        stats = up.result(), down.result()
        for layer, own in self.mixture.by_layer(number, *stats).items():
            check_finite(layer, own)
        return stats

    def _add_outputs(self, numbers: Iterable[int]) -> None:
        """Add what some experts make of their tokens to the mixture's output."""
        outputs = torch.from_numpy(self._outputs)
        for number in numbers:
            parts = (part[number].split(TOKENS_PER_BATCH) for part in (self._rows, self._weights))
            for rows, weights in zip(*parts, strict=True):
                if len(rows):
                    given = self.mixture.experts.run(number, self._gather(rows)) * weights[:, None]
                    outputs.index_add_(0, rows, given)  # a token may have chosen an expert twice
            self._drop_pages()

    def _gather(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self._inputs[rows.numpy()])

    def _drop_pages(self) -> None:
        """Give pages back that were read or written: they stay in the file."""
        for mapped in (self._inputs, self._outputs):
            mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The mixture gives what its experts gave, batch after batch, while the block is run over the set once."""
        start = 0

        def replay(hidden: Tensor, *routes: Tensor, **named: Tensor) -> Tensor:
            nonlocal start
            stop = start + hidden.numel() // hidden.shape[-1]
            given = torch.from_numpy(np.array(self._outputs[start:stop])).view(hidden.shape)
            start = stop
            return given

        with instead_of(self.mixture.experts, replay):
            yield

    def remove(self) -> None:
        """Delete the files."""
        for name in EXPERT_FILES:
            (self._folder / name).unlink()


class _Pool:
    """The statistics of a mixture's experts taken together."""

    def __init__(self, up: LayerStats) -> None:
        self.up = up
        self._hessian, self._absmax, self._n_tokens = torch.tensor(0.0), torch.tensor(0.0), 0

    def add(self, stats: LayerStats) -> None:
        """Add what the second linear of an expert read."""
        self._hessian = torch.add(self._hessian, stats.hessian, alpha=stats.n_tokens)
        self._absmax = torch.maximum(self._absmax, stats.absmax)
        self._n_tokens += stats.n_tokens

    @property
    def down(self) -> LayerStats:
        return LayerStats(self._hessian / max(self._n_tokens, 1), self._n_tokens, self._absmax)


def run_block(model: BlockwiseModel, index: int, hidden: list[Tensor]) -> Iterator[Tensor]:
    """The output of a block for every batch [batch, seq, hidden], in turn; its experts, where it is a mixture, are in
    memory a few at a time, and its tokens lie in the folder for temporary files.
    """
    name = model.mixture(index)
    with model.block(index, experts=False), ExitStack() as stack:
        if name is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="qtool-experts-")))
            tokens = RoutedTokens(Mixture(model, index, name), HeldStates(folder, hidden), pools=False)
            tokens.give()
            stack.enter_context(tokens.replayed())
        for states in hidden:
            yield model.run(index, states)


def visit_block(
    model: BlockwiseModel, index: int, states: HiddenStates | None, min_tokens: int, handle: Handle, n_batches: int = 1
) -> tuple[int | None, dict[str, dict[str, list[int]]]]:
    """Calibrate and handle a block that has its own weights, its experts a few at a time where it is a mixture, and
    make the next block's input.  -> the checksum of that, and what is to be told of the experts by their mixture
    """
    stats, late = calibrate(model, index, states)
    first = [name for name in model.own_names(index) if split_name(name)[0] not in late]
    handle(first, stats)
    name = model.mixture(index)
    if name is None:
        return advance(model, index, states), {}
    mixture = Mixture(model, index, name, n_batches)
    if states is None:
        mixture.visit(handle)
        return None, {}
    tokens = RoutedTokens(mixture, states)
    few = tokens.visit(min_tokens, handle)
    if late:
        with tokens.replayed():
            found = calibrate_late(model, index, states, late)
        handle([name for name in model.own_names(index) if split_name(name)[0] in late], found)
    with tokens.replayed():
        checksum = advance(model, index, states)
    tokens.remove()
    return checksum, {name: {"tokens": tokens.counts, "pooled": few}}
