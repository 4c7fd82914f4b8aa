"""Modules that multiply by, or look up in, a section as it lies in the file."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.encoding import MatrixEncoding, Shape
from formats.errors import FormatError, error_context
from formats.kernels.ops import linear, rows, tag_of
from formats.reader import QtmFile
from formats.skeleton import is_linear, parameter_names, split_name


class QuantLinear(nn.Module):
    """y = x @ decode(W).T + b over a section as it lies in the file, decoded on each call.

    `weight` [out, 0] has no values: a model asks it for its dtype (that of the activations), its device and its rows.
    """

    weight: Tensor

    def __init__(
        self,
        section: Tensor,
        shape: Shape,
        encoding: MatrixEncoding,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.encoding = encoding
        self._tag = tag_of(encoding, shape)
        # A parameter, though it is none to train: transformers ties, places and saves those.
        self.section = nn.Parameter(section, requires_grad=False)
        self.register_buffer("weight", torch.empty((shape[0], 0), dtype=dtype, device=section.device), persistent=False)
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
    """An embedding whose rows are decoded as they are looked up. Made by `put_section` only."""

    packed: QuantLinear

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.packed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.packed.rows(ids).to(self.packed.weight.dtype)


def takes_sections(module: nn.Module, name: str) -> bool:
    """Whether the tensor `name` of `module` can stay packed: others are decoded once."""
    return split_name(name)[1] == "weight" and (is_linear(module) or isinstance(module, nn.Embedding))


def put_section(
    model: PreTrainedModel, name: str, section: Tensor, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype
) -> str:
    """Let the weight `name` of `model` be a section from now on; returns the name of the parameter that holds it.

    dtype: of activations, and of an embedding's rows.
    """
    owner, parameter = split_name(name)[0], section_name(model, name)
    module = model.get_submodule(owner)
    if isinstance(module, nn.Embedding):
        _quantize_in_place(module, QuantLinear(section, shape, encoding, None, dtype))
    else:
        model.set_submodule(owner, QuantLinear(section, shape, encoding, cast(Any, module).bias, dtype))
    return parameter


def section_name(model: PreTrainedModel, name: str) -> str:
    """The parameter that holds the section of the weight `name` once it has one."""
    owner, _ = split_name(name)
    is_embedding = isinstance(model.get_submodule(owner), nn.Embedding)
    return f"{owner}.packed.section" if is_embedding else f"{owner}.section"


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


def check_tensors(model: PreTrainedModel, file: QtmFile) -> None:
    """FormatError unless the file has just the tensors that the model of its config has, in their shapes."""
    for entry in file.tensors.values():
        with error_context(f"{file.label}: {entry.label}"):
            owner_of(model, entry.name, entry.shape[::-1] if entry.transposed else entry.shape)
    for names in parameter_names(model).values():
        if not any(name in file.tensors for name in names):
            raise FormatError(
                f"{file.label}: tensor {names[0]!r} is missing; the model's config implies it (SPEC 3.4.1)"
            )


def owner_of(model: PreTrainedModel, name: str, shape: Shape) -> nn.Module:
    """The module that has the parameter or buffer `name`; FormatError unless it has this shape, in its orientation."""
    owner, leaf = split_name(name)
    try:
        module = model.get_submodule(owner)
        expected = cast(Tensor, (module._parameters | module._buffers)[leaf]).shape
    except (AttributeError, KeyError) as error:
        raise FormatError("the model's config has no such tensor (SPEC 3.4.1)") from error
    if tuple(expected) != tuple(shape):
        raise FormatError(f"the model's config implies shape {list(expected)} (SPEC 3.4.1)")
    return module
