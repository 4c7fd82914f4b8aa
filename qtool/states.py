"""The calibration set's hidden states between two blocks, on disk: memory holds one batch, whatever the set's size.

Two files take turns. A block reads what the block before it wrote and writes the other file, so that what a
resumed run needs is whole at every moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import CheckpointError

STATES_FILES = ("states.0", "states.1")
TOKENS_PER_BATCH = 1024
"""Tokens run through a block at a time: enough for full matrix speed, little enough for short temporaries."""


class HiddenStates:
    """float32 states [batch, seq, hidden], batch after batch; step i is what block i reads."""

    def __init__(self, folder: Path, ids: Tensor, windows_per_batch: int) -> None:
        self._folder = folder
        self.batches = ids.split(windows_per_batch)
        """The token ids [batch, seq] of each batch."""

    def write(self, step: int, states: Iterable[Tensor]) -> None:
        """Store the input of block `step`, durably."""
        with open(self._path(step), "wb") as file:
            for batch in states:
                file.write(batch.float().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, step: int) -> Iterator[Tensor]:
        """The input of block `step`, a batch at a time, each in memory of its own."""
        path = self._path(step)
        n_tokens = sum(ids.numel() for ids in self.batches)
        width, rest = divmod(path.stat().st_size, 4 * n_tokens)
        if rest or not width:
            raise CheckpointError(f"{path}: damaged; give --restart to begin anew")
        with open(path, "rb") as file:
            for ids in self.batches:
                states = torch.empty(*ids.shape, width)
                file.readinto(states.numpy().data)
                yield states

    def _path(self, step: int) -> Path:
        return self._folder / STATES_FILES[step % 2]
