"""An ordinary Hugging Face folder whose weights are the decoded ones, written a shard at a time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from formats.embedded import config_dict, model_config
from formats.errors import FormatError
from formats.loader import decode_tensor
from formats.reader import QtmFile
from formats.skeleton import build_skeleton

MAX_SHARD_BYTES = 1 << 30  # what is decoded at a time, unless one group of tensors is larger
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_dense(file: QtmFile, folder: Path, *, dtype: str = "float32", overwrite: bool = False) -> list[str]:
    """Write the folder and return the names of its files. float32 holds the decoded values exactly.

    It appears whole or not at all. Raises FormatError when the folder exists, and with `overwrite` when it does
    not look like a model's: nothing but an earlier export is ever replaced.
    """
    folder = folder.resolve()
    if folder.exists():
        _check_replaceable(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        part = Path(scratch) / "part"
        part.mkdir()
        try:
            _write_weights(file, part, DTYPES[dtype])
        except SafetensorError as error:  # what a full disk is to safetensors
            raise FormatError(f"{folder}: cannot be written ({error}); nothing was left behind, make room") from error
        config = config_dict(file) | {"dtype": dtype}
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name in file.files:
            (part / name).write_bytes(file.read_file(name))
        if folder.exists():
            os.rename(folder, Path(scratch) / "replaced")
        os.rename(part, folder)
    return sorted(path.name for path in folder.iterdir())


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise FormatError(f"{folder}: exists already; give another folder or --force")
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise FormatError(f"{folder}: holds the working directory and is not replaced; give another folder")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    is_model = any(path.name == "config.json" for path in entries) and all(path.is_file() for path in entries)
    if not folder.is_dir() or (entries and not is_model):
        raise FormatError(f"{folder}: is not a model folder and is not replaced, even with --force; give another")


def _write_weights(file: QtmFile, folder: Path, dtype: torch.dtype) -> None:
    shards: list[tuple[Path, dict[str, Tensor]]] = []
    weight_map: dict[str, str] = {}
    total = 0
    for index, tensors in enumerate(_shards(file, dtype)):
        path = folder / f"{index}.part"
        save_file(tensors, path, metadata={"format": "pt"})
        shards.append((path, dict.fromkeys(tensors)))  # type: ignore[arg-type]
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    for index, (path, names) in enumerate(shards):
        shard = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")


def _shards(file: QtmFile, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """The decoded tensors under the names that checkpoints use, in shards; a block is never split."""
    model = build_skeleton(model_config(file))
    shard: dict[str, Tensor] = {}
    for names in _groups(file):
        tensors = {name: decode_tensor(file, file.tensors[name]).to(dtype) for name in names}
        # transformers fuses some tensors on loading (experts); on disk they have their published names.
        tensors = revert_weight_conversion(model, tensors)
        if shard and _n_bytes(shard) + _n_bytes(tensors) > MAX_SHARD_BYTES:
            yield shard
            shard = {}
        shard |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        file.drop_pages()
    if shard:
        yield shard


def _groups(file: QtmFile) -> Iterator[list[str]]:
    """Tensor names, those of one block together."""
    blocks = f"{file.header.model.get('blocks')}."
    groups: dict[str, list[str]] = {}
    for name in file.tensors:
        key = name.removeprefix(blocks).partition(".")[0] if name.startswith(blocks) else ""
        groups.setdefault(key, []).append(name)
    yield from groups.values()


def _n_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
