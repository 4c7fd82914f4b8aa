"""A `.qtm` file as a running transformers model whose weights stay packed in the mapped file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.embedded import GENERATION_CONFIG, generation_config, model_config, refused
from formats.encoding import INPUT_SCALES, Arrays, MatrixEncoding
from formats.errors import FormatError, error_context
from formats.header import TensorEntry
from formats.kernels.cpu import Rows, as_tensors
from formats.reader import QtmFile, verify_file
from formats.section import part_arrays
from formats.skeleton import build_skeleton, is_linear, parameter_names, set_tensor, split_name

MAX_DECODED_ELEMENTS = 1 << 20
"""Weights decoded at a time (4 MB as float32): the temporaries stay in the cache, and a head never stands whole."""


def load(path: str | os.PathLike[str], *, check: bool = True) -> PreTrainedModel:
    """The causal language model in a `.qtm` file: float32 on the CPU, weights decoded on each call.

    The file stays mapped while the model lives. With `check`, every bit of it is verified first.
    Raises FormatError when the file is damaged, or lacks a tensor that its config implies.
    """
    file = QtmFile.open(path, check=check)
    if check:
        verify_file(file)
    config = model_config(file)
    with refused(f"{path}: header: model", "3.4.1"):
        model = build_skeleton(config)
    aliases = parameter_names(model)
    for entry in file.tensors.values():
        for name in aliases.get(entry.name, [entry.name]):
            _install(model, name, entry, file)
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing:
        raise FormatError(f"{path}: tensor {missing[0]!r} is missing; the model's config implies it (SPEC 3.4.1)")
    if GENERATION_CONFIG in file.files:
        model.generation_config = generation_config(file)
    return model


def decode_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """The values [shape] f32 of a stored tensor, in the model's own orientation; a copy."""
    values = entry.encoding.decode(_checked_arrays(file, entry), entry.shape)
    return values.T.contiguous() if entry.transposed else values


def section_parts(file: QtmFile, entry: TensorEntry) -> dict[str, Tensor]:
    """The parts of a section by name as tensors over the mapped file: nothing is copied."""
    return as_tensors(_checked_arrays(file, entry))


def _checked_arrays(file: QtmFile, entry: TensorEntry) -> Arrays:
    arrays = part_arrays(file.section(entry), entry.shape, entry.encoding)
    with error_context(f"{file.label}: {entry.label}"):
        entry.encoding.check_values(arrays, entry.shape)
    return arrays


class QuantLinear(nn.Module):
    """y = (x * input_scales) @ decode(W).T + b over packed buffers, decoded a stripe of rows at a time."""

    input_scales: Tensor | None

    def __init__(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], encoding: MatrixEncoding, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.encoding = encoding
        held = encoding.hold(parts, shape)
        self._buffer_names = {name: name.replace(".", "_") for name in held}  # a buffer's name has no dot
        for name, tensor in held.items():
            self.register_buffer(self._buffer_names[name], tensor, persistent=False)
        if INPUT_SCALES not in held:
            self.register_buffer(INPUT_SCALES, None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def rows(self, index: Rows) -> Tensor:
        """The decoded rows [n, in] f32 of the weight, input scales not applied."""
        held = {name: getattr(self, buffer) for name, buffer in self._buffer_names.items()}
        return self.encoding.rows(held, index, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scales is not None:
            x = x * self.input_scales.to(x.dtype)
        step = max(1, MAX_DECODED_ELEMENTS // self.in_features)
        stripes = [slice(i, min(i + step, self.out_features)) for i in range(0, self.out_features, step)]
        products = [nn.functional.linear(x, self.rows(stripe).to(x.dtype)) for stripe in stripes]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.encoding}"


class QuantEmbedding(nn.Embedding):
    """An embedding whose rows are decoded as they are looked up. Made by `_quantize_in_place` only."""

    packed: QuantLinear

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Empty: subclasses ask it for the dtype and device that rows come in."""
        return torch.empty(0)

    def forward(self, ids: Tensor) -> Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.packed.rows(unique)
        if self.packed.input_scales is not None:
            rows *= self.packed.input_scales.float()
        return rows[inverse]


def _quantize_in_place(embedding: nn.Embedding, packed: QuantLinear) -> None:
    """Turn `embedding` into a QuantEmbedding. What its own class adds (Gemma's scale, OPT's offset) stays.

    Such a class calls `super().forward(ids)`; with QuantEmbedding behind it in the method resolution order,
    that is our look-up instead of torch's.
    """
    own = type(embedding)
    bases = (QuantEmbedding,) if own is nn.Embedding else (own, QuantEmbedding)
    del embedding.weight
    embedding.__class__ = type(f"Quant{own.__name__}", bases, {})
    embedding.packed = packed


def _install(model: PreTrainedModel, name: str, entry: TensorEntry, file: QtmFile) -> None:
    owner, leaf = split_name(name)
    try:
        module = model.get_submodule(owner)
        expected = cast(Tensor, (module._parameters | module._buffers)[leaf]).shape
    except (AttributeError, KeyError) as error:
        raise FormatError(f"{file.label}: {entry.label}: the model's config has no such tensor (SPEC 3.4.1)") from error
    if tuple(expected) != (entry.shape[::-1] if entry.transposed else entry.shape):
        want = list(expected)
        raise FormatError(f"{file.label}: {entry.label}: the model's config implies shape {want} (SPEC 3.4.1)")
    if not isinstance(entry.encoding, MatrixEncoding) or leaf != "weight":
        set_tensor(model, name, decode_tensor(file, entry))
    elif is_linear(module):
        bias = cast(Any, module).bias
        linear = QuantLinear(section_parts(file, entry), entry.shape, entry.encoding, bias)
        model.set_submodule(owner, linear)
    elif isinstance(module, nn.Embedding):
        _quantize_in_place(module, QuantLinear(section_parts(file, entry), entry.shape, entry.encoding, None))
    else:
        set_tensor(model, name, decode_tensor(file, entry))
