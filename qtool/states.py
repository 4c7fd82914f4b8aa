"""The calibration set's hidden states between two blocks, on disk: memory holds one batch, whatever the set's size.

In a run two files take turns. A block reads what the block before it wrote and writes the other file, so that what a
resumed run needs is whole at every moment; three where blocks are solved in parallel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import nan as NAN
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calibration.capture import HessianCapture
from calibration.hessian import LayerStats
from qtool.errors import ConfigError, naming
from qtool.model import BlockwiseModel, instead_of

STATES_FILES = ("states.0", "states.1", "states.2")
"""The third where a block's step ends only after the next block's: then three steps are of use."""
EXPERT_FILES = ("experts.inputs", "experts.outputs")
"""What the mixture of the block being done reads and gives; each as large as the states."""
TOKENS_PER_BATCH = 1024
"""Tokens run through a block at a time: enough for full matrix speed, little enough for short temporaries."""


def windows_per_batch(seq_len: int) -> int:
    """Windows of `seq_len` tokens that are run through a block together."""
    return max(1, TOKENS_PER_BATCH // seq_len)


class HiddenStates:
    """float32 states [batch, seq, hidden], or gradients there, batch after batch; step i is what block i reads.

    names: of the files, which take turns where there are fewer of them than steps.
    """

    def __init__(
        self, folder: Path, ids: Tensor, windows_per_batch: int, names: Sequence[str] = STATES_FILES[:2]
    ) -> None:
        self.folder, self._names = folder, names
        self.batches = ids.split(windows_per_batch)
        """The token ids [batch, seq] of each batch."""

    def write(self, step: int, states: Iterable[Tensor]) -> int:
        """Store the input of block `step`, durably.  -> its checksum"""
        path, checksum = self._path(step), 0
        with naming(path), open(path, "wb") as file:
            for batch in states:
                batch = batch.float().contiguous()
                checksum = _fold(checksum, batch)
                file.write(batch.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        return checksum

    def check(self, step: int, expected: int) -> None:
        """Refuse states that are not what `write` stored: they would be taken for right, and give another file."""
        checksum = 0
        with suppress(FileNotFoundError):
            for batch in self.read(step):
                checksum = _fold(checksum, batch)
        if checksum != expected:
            raise ConfigError(f"{self._path(step)}: damaged; give --restart to begin anew")

    def read(self, step: int) -> Iterator[Tensor]:
        """The input of block `step`, a batch at a time, each in memory of its own."""
        path = self._path(step)
        width = path.stat().st_size // (4 * sum(ids.numel() for ids in self.batches))
        with open(path, "rb") as file:
            for ids in self.batches:
                states = torch.empty(*ids.shape, width)
                file.readinto(states.numpy().data)
                yield states

    def remove(self, step: int) -> None:
        """Delete the file of a step, if there is one."""
        self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / self._names[step % len(self._names)]


def calibrate(model: BlockwiseModel, index: int, states: HiddenStates | None) -> tuple[dict[str, LayerStats], set[str]]:
    """The statistics of block `index`, which has its weights, by the name of the linear; none without states.

    A mixture's experts need none, and are none of these linears: `qtool.mixture` has theirs. Linears that read what the
    mixture gives have none yet: they come second.
    """
    if states is None:
        return {}, set()
    capture = HessianCapture(model.own_linears(index), unknown_is_nan=model.mixture(index) is not None)
    with without_experts(model, index):
        return capture.run(lambda x: model.run(index, x), states.read(index)), capture.late


def calibrate_late(model: BlockwiseModel, index: int, states: HiddenStates, late: set[str]) -> dict[str, LayerStats]:
    """The statistics of the linears `late`, while the block's mixture gives what it gives."""
    linears = {name: module for name, module in model.own_linears(index).items() if name in late}
    return HessianCapture(linears).run(lambda x: model.run(index, x), states.read(index))


def advance(model: BlockwiseModel, index: int, states: HiddenStates | None) -> int | None:
    """Store the output of block `index` as the next one's input.  -> its checksum; None where nothing reads it"""
    if states is None or index + 1 == len(model.blocks):
        return None
    return states.write(index + 1, (model.run(index, x) for x in states.read(index)))


@contextmanager
def without_experts(model: BlockwiseModel, index: int) -> Iterator[None]:
    """The block's mixture gives NaN for now: whatever is computed from it shows that it was."""
    name = model.mixture(index)
    if name is None:
        yield
        return
    with instead_of(model.skeleton.get_submodule(name), lambda hidden, *routes, **named: torch.full_like(hidden, NAN)):
        yield


def calibrate_and_advance(model: BlockwiseModel, index: int, states: HiddenStates) -> tuple[dict[str, LayerStats], int]:
    """Both in one pass, for a block whose weights stay as they are."""
    capture = HessianCapture(model.linears(index))
    inputs = states.read(index)
    if index + 1 == len(model.blocks):
        return capture.run(lambda x: model.run(index, x), inputs), 0
    checksum = states.write(index + 1, capture.outputs(lambda x: model.run(index, x), inputs))
    return capture.results(), checksum


def _fold(checksum: int, batch: Tensor) -> int:
    """A sum of the bits: against lost writes, not against enemies, and far cheaper than any hash."""
    words = batch.numpy().reshape(-1).view(np.uint64 if batch.numel() % 2 == 0 else np.uint32)
    return (checksum * 1_000_003 + int(words.sum(dtype=np.uint64))) % 2**64
