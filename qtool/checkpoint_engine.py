"""A folder that somebody else quantized: codes where our layers have them, decoded tensors for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats.errors import error_context
from formats.experts import expert_of
from formats.export.published import Rows, published_rows
from formats.layer import Layer
from formats.layouts.affine import Affine
from formats.skeleton import is_transposed_linear, split_name
from qtool.checkpoint import HuggingFaceCheckpoint, find_tensor
from qtool.errors import CheckpointError
from qtool.schemes import Scheme, scheme_of

OLDER_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ said what they had done, before config.json had a place for it."""


class EngineCheckpoint(HuggingFaceCheckpoint):
    """Reads as a model whose weights are the decoded ones: the parts of a linear are one stored tensor, its weight."""

    scheme: Scheme

    def __init__(self, folder: Path, *, assume_v1_zeros: bool = False) -> None:
        self._assume_v1_zeros = assume_v1_zeros
        self._parts: dict[str, dict[str, str]] = {}  # weight -> what stands behind its module's name -> the shard
        super().__init__(folder)
        if not self._parts:
            raise CheckpointError(f"{self.name}: none of its linears is quantized; qtool compress is for such a model")

    def _config_values(self) -> dict[str, Any]:
        values = super()._config_values()
        for name, method in OLDER_CONFIGS.items():
            if not hasattr(self, "scheme") and (self.folder / name).is_file():
                self._take_quantization({"quant_method": method} | self._json_object(name))
        if not hasattr(self, "scheme"):
            raise CheckpointError(f"{self.name}: not quantized (no quantization_config); qtool compress is for it")
        return values

    def _take_quantization(self, quantization: Any) -> None:
        self.scheme = scheme_of(quantization, self.name, assume_v1_zeros=self._assume_v1_zeros)
        self.format = str(quantization["quant_method"])

    def _index(self) -> dict[str, str]:
        stored = super()._index()
        modules = {split_name(key)[0] for key in stored if split_name(key)[1] == self.scheme.main}
        others = {}
        for key, shard in stored.items():
            module, part = split_name(key)
            if module not in modules or part == "bias":
                others[key] = shard
            elif part not in self.scheme.parts:
                raise CheckpointError(f"{self.name}: tensor {key}: import does not know what it does")
            else:
                self._parts.setdefault(f"{module}.weight", {})[part] = shard
        return others | {weight: next(iter(parts.values())) for weight, parts in self._parts.items()}

    def unused(self) -> list[str]:
        """But for biases of zeros, which older programs stored for every linear."""
        return [key for key in super().unused() if not self._is_zero_bias(key)]

    def _is_zero_bias(self, key: str) -> bool:
        module, part = split_name(key)
        if part != "bias" or f"{module}.weight" not in self._parts:
            return False
        with self._open(self._shard_of[key]) as shard:
            return not bool(shard.get_tensor(key).any())

    def _slice(self, shard: Any, key: str) -> Any:
        return _Decoded(self, key) if key in self._parts else super()._slice(shard, key)

    def affine(self, weight: str) -> Affine:
        """A stored weight as it is packed."""
        module, found = split_name(weight)[0], dict[str, npt.NDArray[Any]]()
        parts = defaultdict(list)
        for part, shard in self._parts[weight].items():
            parts[shard].append(part)
        with ExitStack() as stack:
            for shard, names in parts.items():
                opened = stack.enter_context(self._open(shard))
                found |= {part: _as_array(opened.get_tensor(f"{module}.{part}")) for part in names}
        with error_context(f"{self.name}: {module}"):
            return self.scheme.unpack(module, found)

    def sources_of(self, name: str) -> list[tuple[str, npt.NDArray[np.int64] | None]]:
        """Of the parameter `name`: each stored weight that makes it, all packed, and which of its outputs it gives.

        None: all, as they are. An empty list where the parameter is not packed.
        """
        keys = self._sources.get(self._stored_as.get(name, name), [])
        found: list[tuple[str, npt.NDArray[np.int64] | None]] = [(key, None) for key in keys]
        if len(keys) != 1 or keys[0] in self._converter_of:
            found = [(key, part.rows) for key, part in self._published.items() if part.name == name]
        return found if found and all(key in self._parts for key, _ in found) else []

    @cached_property
    def _published(self) -> dict[str, Rows]:
        """What the weights of mixtures are called where they are stored."""
        names = [name for name, _ in self._model.named_parameters() if expert_of(name) is not None]
        with error_context(self.name):
            return published_rows(self._model, {name: len(find_tensor(self._model, name)) for name in names})


class _Decoded:
    """A packed weight in the place of a slice of a safetensors file."""

    def __init__(self, checkpoint: EngineCheckpoint, key: str) -> None:
        self._checkpoint, self._key = checkpoint, key

    def __getitem__(self, index: Any) -> Tensor:
        return torch.from_numpy(self._checkpoint.affine(self._key).dequantize())[index]

    def get_shape(self) -> list[int]:
        return list(self._checkpoint.affine(self._key).codes.shape)

    def get_dtype(self) -> str:
        return "F32"


def _as_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Floats as f32, since numpy has no bf16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class EngineSource:
    """The packed layers of a checkpoint, by the names that the model's skeleton has for them."""

    def __init__(self, folder: Path, *, assume_v1_zeros: bool = False) -> None:
        self.checkpoint = EngineCheckpoint(folder, assume_v1_zeros=assume_v1_zeros)
        self.decoded: dict[str, str] = {}
        """Parameters that were packed and that no layer of ours holds, and why."""

    def layer(self, name: str) -> Layer | None:
        """The layer [out, in] of the parameter `name`; None where it is dense, or has to be."""
        sources = self.checkpoint.sources_of(name)
        if not sources:
            return None
        found = _joined([self.checkpoint.affine(key) for key, _ in sources])
        shape = tuple(find_tensor(self.checkpoint._model, name).shape)
        module = self.checkpoint._model.get_submodule(split_name(name)[0])
        if is_transposed_linear(module):
            shape = shape[::-1]
        if found is None:
            self.decoded[name] = "its parts have other groups or bits; stored as float32"
            return None
        if found.codes.shape != shape:
            raise CheckpointError(
                f"{self.checkpoint.name}: {name} is {list(found.codes.shape)}, the model's config implies {list(shape)}"
            )
        if (obstacle := found.obstacle()) is not None:
            self.decoded[name] = f"{obstacle}; stored as float32"
            return None
        numbers = [rows for _, rows in sources if rows is not None]
        return (_in_order(found, np.concatenate(numbers)) if numbers else found).layer()


def _joined(stored: Iterable[Affine]) -> Affine | None:
    """One above the other; None where their groups or bits differ."""
    first, *others = stored
    for other in others:
        alike = (other.bits, other.group_size) == (first.bits, first.group_size)
        if not alike or not np.array_equal(other.groups, first.groups):
            return None
    every = (first, *others)
    return replace(
        first,
        codes=np.concatenate([one.codes for one in every]),
        scales=np.concatenate([one.scales for one in every]),
        zeros=np.concatenate([one.zeros for one in every]),
    )


def _in_order(stored: Affine, rows: npt.NDArray[np.int64]) -> Affine:
    """Stored outputs in the order in which the parameter has them.  rows: which of the parameter's each one is"""
    order = np.argsort(rows)
    return replace(stored, codes=stored.codes[order], scales=stored.scales[order], zeros=stored.zeros[order])
