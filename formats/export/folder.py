"""A Hugging Face folder, written a shard at a time, that appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.block_lists import BlockLists
from formats.errors import FormatError
from formats.export.card import CARD, Loading, model_card
from formats.export.report import Loss
from formats.reader import QtmFile
from formats.skeleton import without_references

MAX_SHARD_BYTES = 1 << 30  # what is in memory at a time, unless one block is larger
Tensors = dict[str, Tensor]


def write_folder(
    file: QtmFile,
    folder: Path,
    blocks: Iterable[Tensors],
    config: Mapping[str, Any],
    *,
    overwrite: bool,
    loading: Loading,
    losses: Sequence[Loss] = (),
    texts: Mapping[str, str] | None = None,
) -> list[str]:
    """Write tensors, config, the file's own tokenizer and a model card; returns the names of the folder's files.

    blocks: what a shard holds together, by the names that go into the folder. Raises FormatError when the folder
    exists, and with `overwrite` when it does not look like a model's: nothing but an earlier export is ever replaced.
    loading: what the card says of it; losses: the same, read when all blocks are written.
    texts: other files of the format, by name.
    """
    folder, texts = folder.resolve(), texts or {}
    for name in file.files:
        is_taken = name in texts or re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name)
        if name in ("config.json", CARD) or is_taken:
            raise FormatError(f"{file.label}: file {name!r}: has the name of what is exported")
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        part = Path(scratch) / "part"
        part.mkdir()
        try:
            _write_weights(part, blocks)
        except SafetensorError as error:  # what a full disk is to safetensors
            raise FormatError(f"{folder}: cannot be written ({error}); nothing was left behind, make room") from error
        config_json = json.dumps(without_references(dict(config)), indent=2, sort_keys=True)
        (part / "config.json").write_text(config_json + "\n", encoding="utf-8")
        weights_bytes = sum(path.stat().st_size for path in part.glob("*.safetensors"))
        card = model_card(file, title=folder.name, loading=loading, weights_bytes=weights_bytes, losses=losses)
        for name, text in ({CARD: card} | dict(texts)).items():
            (part / name).write_text(text, encoding="utf-8")
        for name in file.files:
            (part / name).write_bytes(file.read_file(name))
        if folder.exists():
            os.rename(folder, Path(scratch) / "replaced")
        os.rename(part, folder)
    return sorted(path.name for path in folder.iterdir())


def names_by_block(file: QtmFile) -> Iterable[list[str]]:
    """Tensor names, those of one block together."""
    lists = BlockLists.of(file.header.model, file.tensors)
    groups: dict[int | None, list[str]] = {}
    for name in file.tensors:
        groups.setdefault(lists.number(name), []).append(name)
    return groups.values()


def check_target(folder: Path, overwrite: bool) -> None:
    """FormatError where the folder exists and may not be replaced."""
    folder = folder.resolve()
    if folder.exists():
        _check_replaceable(folder, overwrite)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise FormatError(f"{folder}: exists already; give another folder or --force")
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise FormatError(f"{folder}: holds the working directory and is not replaced; give another folder")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    is_model = any(path.name == "config.json" for path in entries) and all(path.is_file() for path in entries)
    if not folder.is_dir() or (entries and not is_model):
        raise FormatError(f"{folder}: is not a model folder and is not replaced, even with --force; give another")


def _write_weights(folder: Path, blocks: Iterable[Tensors]) -> None:
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for index, tensors in enumerate(_shards(blocks)):
        path = folder / f"{index}.part"
        save_file(tensors, path, metadata={"format": "pt"})
        shards.append((path, list(tensors)))
        total += _n_bytes(tensors)
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, (path, names) in enumerate(shards):
        shard = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n", encoding="utf-8")


def _shards(blocks: Iterable[Tensors]) -> Iterator[Tensors]:
    """Whole blocks, as many as MAX_SHARD_BYTES hold."""
    shard: Tensors = {}
    for tensors in blocks:
        if shard and _n_bytes(shard) + _n_bytes(tensors) > MAX_SHARD_BYTES:
            yield shard
            shard = {}
        shard |= tensors
    if shard:
        yield shard


def _n_bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
