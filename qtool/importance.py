"""How much each input of a linear matters: the mean squares that a file's own blocks see on calibration text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from calibration.corpus import calibration_windows
from qtool.checkpoint_qtm import QtmCheckpoint
from qtool.errors import CheckpointError
from qtool.model import BlockwiseModel
from qtool.numerics import release_free_memory
from qtool.seq2seq import blockwise_model

WINDOWS, SEQ_LEN = 4, 256
"""Enough for a diagonal: its largest entries are a hundred times the mean, and the same few in any text."""


@torch.no_grad()
def measure_importance(
    path: Path, *, source: str = "builtin", n_windows: int = WINDOWS, seq_len: int = SEQ_LEN, seed: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """By the name of the weight of each linear in a block, [in] f32: the mean square of each input.

    source: text as `--calibration` names it. An expert that no token reaches is left out.
    """
    checkpoint = QtmCheckpoint(path)
    model, tokenizer = blockwise_model(checkpoint), checkpoint.tokenizer()
    windows = calibration_windows(
        source,
        lambda text: list(tokenizer(text, verbose=False).input_ids),
        n_samples=n_windows,
        seq_len=model.window_length(seq_len),
        seed=seed,
    )
    ids = torch.from_numpy(windows.ids)
    model.check_tokens(ids)
    with model.outside(head=False):
        hidden = [model.embed(window[None]) for window in ids]
    found: dict[str, npt.NDArray[np.float32]] = {}
    for index in tqdm(range(len(model.blocks)), unit="block", desc="inputs", disable=None):
        with model.block(index):
            hidden = _run(model, index, hidden, found)
        release_free_memory()
    return found


def _run(
    model: BlockwiseModel, index: int, hidden: list[Tensor], found: dict[str, npt.NDArray[np.float32]]
) -> list[Tensor]:
    """The block's outputs; what its linears read is added to `found`."""
    sums: dict[str, tuple[Tensor, int]] = {}
    linears = model.linears(index)
    hooks = [module.register_forward_pre_hook(_adding(sums, name)) for name, module in linears.items()]
    try:
        outputs = [model.run(index, states) for states in hidden]
    finally:
        for hook in hooks:
            hook.remove()
    for name, (total, n_tokens) in sums.items():
        if not torch.isfinite(total).all():
            raise CheckpointError(
                f"{model.checkpoint.name}: the input of {name} is NaN or infinite; the file is broken"
            )
        found[f"{name}.weight"] = (total / n_tokens).numpy()
    return outputs


def _adding(sums: dict[str, tuple[Tensor, int]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        total, n_tokens = sums.get(name, (torch.zeros(x.shape[1]), 0))
        sums[name] = total + x.square().sum(dim=0), n_tokens + len(x)

    return hook
