"""Logits as `qtool eval` gets them: a block at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qtool.checkpoint import open_checkpoint
from qtool.numerics import exact_float32
from qtool.seq2seq import blockwise_model


def blockwise_logits(model: Path, ids: torch.Tensor) -> torch.Tensor:
    """[batch, seq, vocab] for a folder, a GGUF file or a file of ours; of an encoder-decoder, over the second half."""
    blockwise = blockwise_model(open_checkpoint(str(model)))
    with exact_float32():
        with blockwise.outside(head=False):
            hidden = blockwise.embed(ids)
        for index in range(len(blockwise.blocks)):
            with blockwise.block(index):
                hidden = blockwise.run(index, hidden)
        with blockwise.outside(head=True):
            return blockwise.logits(hidden[:, blockwise.predicting(ids.shape[1])])


def some_ids(batch: int = 1) -> torch.Tensor:
    """[batch, 48] random bytes."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 48)))
