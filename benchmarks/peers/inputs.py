"""What all peers calibrate on: the same windows of tokens, and the mean squared input of every linear."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.job import is_block_linear
from calibration.corpus import calibration_windows

SEQ_LEN = 1024


def windows_of(model: Path, text: Path, *, n_windows: int, seed: int) -> bytes:
    """A .npy file of [n_windows, SEQ_LEN] int64 ids: the windows that qtool draws from `text` with the same seed."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, verbose=False).input_ids)

    windows = calibration_windows(str(text), encode, n_samples=n_windows, seq_len=SEQ_LEN, seed=seed)
    file = io.BytesIO()
    np.save(file, windows.ids)
    return file.getvalue()


@torch.no_grad()
def importance_of(model: Path, windows: npt.NDArray[np.int64]) -> bytes:
    """A .safetensors file, by block linear [in] float32: its squared input, as llama-imatrix collects it.

    windows: [n, seq_len] token ids; the mean is over all of them.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and is_block_linear(name, module.weight.dim()):
            sums[f"{name}.weight"] = torch.zeros(module.in_features)
            module.register_forward_pre_hook(_adding_squares(sums[f"{name}.weight"]))
    for window in torch.from_numpy(windows):
        network.model(window[None])
    return save({name: total / windows.size for name, total in sums.items()})


def _adding_squares(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.add_(inputs[0].flatten(0, -2).square().sum(dim=0))

    return hook
