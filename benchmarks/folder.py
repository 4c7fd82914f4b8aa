"""A model's folder with other weights in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def replace_tensors(model: Path, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy `model` to `folder`, where `tensors` take the place of those of their names; the others stay as stored."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    merged = {**load_file(folder / "model.safetensors"), **tensors}
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
