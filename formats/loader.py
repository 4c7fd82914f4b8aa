"""A `.qtm` file as a running transformers model whose weights stay packed in the mapped file."""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.device import default_dtype, ready_device
from formats.embedded import GENERATION_CONFIG, generation_config, model_config, refused
from formats.encoding import Arrays, MatrixEncoding, Shape
from formats.errors import FormatError, error_context
from formats.header import TensorEntry
from formats.kernels.cpu import as_tensors
from formats.kernels.layout import layout_of
from formats.kernels.ops import linear, rows, tag_of
from formats.reader import QtmFile, verify_file
from formats.section import part_arrays
from formats.skeleton import build_skeleton, is_linear, parameter_names, set_tensor, split_name


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> PreTrainedModel:
    """The causal language model in a `.qtm` file, weights packed as in the file and decoded on each call.

    On the CPU the file stays mapped while the model lives; a GPU gets the sections as they lie. dtype: of the
    activations and of what is not packed; without it float32 on the CPU, bfloat16 on a GPU that has it and float16 on
    others. With `check`, every bit is verified first. Raises FormatError when the file is damaged, or lacks a tensor
    that its config implies, and KernelError when the device cannot run it.
    """
    file = QtmFile.open(path, check=check)
    where = ready_device(device, sum(entry.n_bytes for entry in file.tensors.values()))
    if check:
        verify_file(file)
    config = model_config(file)
    with refused(f"{path}: header: model", "3.4.1"):
        model = build_skeleton(config)
    aliases = parameter_names(model)
    dtype = dtype or default_dtype(where)
    for entry in file.tensors.values():
        _install(model, aliases.get(entry.name, [entry.name]), entry, file, where, dtype)
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing:
        raise FormatError(f"{path}: tensor {missing[0]!r} is missing; the model's config implies it (SPEC 3.4.1)")
    if GENERATION_CONFIG in file.files:
        model.generation_config = generation_config(file)
    return cast(PreTrainedModel, cast(nn.Module, model).to(where))


def decode_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """The values [shape] f32 of a stored tensor, in the model's own orientation; a copy."""
    values = entry.encoding.decode(_checked_arrays(file, entry), entry.shape)
    return values.T.contiguous() if entry.transposed else values


def section_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """A section as a tensor [bytes] u8 over the mapped file: nothing is copied."""
    _checked_arrays(file, entry)
    return as_tensors({"section": np.frombuffer(file.section(entry), np.uint8)})["section"]


def _checked_arrays(file: QtmFile, entry: TensorEntry) -> Arrays:
    arrays = part_arrays(file.section(entry), entry.shape, entry.encoding)
    with error_context(f"{file.label}: {entry.label}"):
        entry.encoding.check_values(arrays, entry.shape)
    return arrays


class QuantLinear(nn.Module):
    """y = x @ decode(W).T + b over a section as it lies in the file, decoded on each call."""

    section: Tensor

    def __init__(self, section: Tensor, shape: Shape, encoding: MatrixEncoding, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.encoding = encoding
        self._tag = tag_of(encoding, shape)
        self.register_buffer("section", section, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows [...] i64 of the decoded weight: [..., in] f32."""
        return cast(Tensor, rows(ids, self.section, self._tag))

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, linear(x, self.section, self._tag))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.encoding}"


class QuantEmbedding(nn.Embedding):
    """An embedding whose rows are decoded as they are looked up. Made by `_quantize_in_place` only."""

    packed: QuantLinear
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Empty: subclasses ask it for the dtype and device that rows come in."""
        return self.packed.section.new_empty(0, dtype=self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed.rows(ids).to(self.dtype)


def _quantize_in_place(embedding: nn.Embedding, packed: QuantLinear, dtype: torch.dtype) -> None:
    """Turn `embedding` into a QuantEmbedding. What its own class adds (Gemma's scale, OPT's offset) stays.

    Such a class calls `super().forward(ids)`; with QuantEmbedding behind it in the method resolution order,
    that is our look-up instead of torch's.
    """
    own = type(embedding)
    bases = (QuantEmbedding,) if own is nn.Embedding else (own, QuantEmbedding)
    del embedding.weight
    embedding.__class__ = type(f"Quant{own.__name__}", bases, {})
    embedding.packed, embedding.dtype = packed, dtype  # type: ignore[assignment]


def _install(
    model: PreTrainedModel,
    names: list[str],
    entry: TensorEntry,
    file: QtmFile,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a tensor to the model under all its names: a tied one is on the device once."""
    section: Tensor | None = None
    for name in names:
        owner, leaf = split_name(name)
        module = _owner(model, name, entry, file)
        is_packed = isinstance(entry.encoding, MatrixEncoding) and leaf == "weight"
        if not is_packed or not (is_linear(module) or isinstance(module, nn.Embedding)):
            set_tensor(model, name, decode_tensor(file, entry).to(device, dtype))
            continue
        encoding = cast(MatrixEncoding, entry.encoding)
        if device.type != "cpu":
            layout_of(encoding, entry.shape)  # refuses what no kernel takes
        section = section_tensor(file, entry).to(device) if section is None else section
        if is_linear(module):
            bias = cast(Any, module).bias
            model.set_submodule(owner, QuantLinear(section, entry.shape, encoding, bias))
        else:
            packed = QuantLinear(section, entry.shape, encoding, None)
            _quantize_in_place(cast(nn.Embedding, module), packed, dtype)


def _owner(model: PreTrainedModel, name: str, entry: TensorEntry, file: QtmFile) -> nn.Module:
    """The module that has the parameter or buffer `name`, of the shape of `entry`."""
    owner, leaf = split_name(name)
    try:
        module = model.get_submodule(owner)
        expected = cast(Tensor, (module._parameters | module._buffers)[leaf]).shape
    except (AttributeError, KeyError) as error:
        raise FormatError(f"{file.label}: {entry.label}: the model's config has no such tensor (SPEC 3.4.1)") from error
    if tuple(expected) != (entry.shape[::-1] if entry.transposed else entry.shape):
        want = list(expected)
        raise FormatError(f"{file.label}: {entry.label}: the model's config implies shape {want} (SPEC 3.4.1)")
    return module
