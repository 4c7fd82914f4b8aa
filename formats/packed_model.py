"""A transformers model with room for sections, and the check of what was put into it: what the plug-in does."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formats.encoding import MatrixEncoding, Shape, encoding_from_fields
from formats.errors import FormatError, error_context
from formats.modules import QuantLinear, owner_of, put_section, takes_sections
from formats.section import part_arrays
from formats.skeleton import is_transposed_linear, split_name
from formats.strict_json import as_object, brief


def make_room(model: PreTrainedModel, weights: Any, dtype: torch.dtype) -> list[str]:
    """Let the named weights of a model on meta be empty sections; returns the names of the parameters that hold them.

    weights: name -> shape and fields of the encoding (SPEC 5.1), as `config.json` has them; checked here. Weights that
    are tied to one another share a section, in the file and in memory.
    """
    tied = dict(model.all_tied_weights_keys)
    sections: dict[str, str] = {}
    with error_context("config.json: quantization_config: weights"):
        for name, fields in as_object("its content", weights).items():
            with error_context(brief(name)):
                encoding, shape = _encoding_of(as_object("its content", fields))
                for alias in (name, *(target for target, source in tied.items() if source == name)):
                    sections[alias] = _put_empty(model, alias, encoding, shape, dtype)
    moved = {sections[target]: sections[source] for target, source in tied.items() if target in sections}
    kept = {target: source for target, source in tied.items() if target not in sections}
    model.all_tied_weights_keys = kept | moved
    if moved:
        cast(Any, model)._tied_weights_keys = kept | moved  # of this model: what is tied when it is saved, or tied anew
    return list(dict.fromkeys(sections.values()))


def _encoding_of(fields: dict[str, Any]) -> tuple[MatrixEncoding, Shape]:
    shape = fields.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise FormatError(f"shape={brief(shape)}: must be two positive numbers")
    encoding = encoding_from_fields(fields)
    if not isinstance(encoding, MatrixEncoding):
        raise FormatError(f"{encoding.name}: is no matrix")
    return encoding, (shape[0], shape[1])


def _put_empty(model: PreTrainedModel, name: str, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> str:
    module = model.get_submodule(split_name(name)[0])
    owner_of(model, name, shape[::-1] if is_transposed_linear(module) else shape)
    if not takes_sections(module, name):
        raise FormatError("is no linear layer or embedding: nothing multiplies by a section there")
    section = torch.empty(encoding.section_bytes(shape), dtype=torch.uint8, device="meta")
    return put_section(model, name, section, encoding, shape, dtype)


def check_sections(model: nn.Module, names: list[str]) -> None:
    """FormatError unless the values in each section are ones that its encoding allows: a kernel relies on it."""
    seen: set[int] = set()
    for name in names:
        module = cast(QuantLinear, model.get_submodule(split_name(name)[0]))
        if module.section.is_meta or module.section.data_ptr() in seen:
            continue  # on disk until it is used, or another's
        seen.add(module.section.data_ptr())
        with error_context(name):
            check_section(module.section, module.encoding, (module.out_features, module.in_features))


def check_section(section: Tensor, encoding: MatrixEncoding, shape: Shape) -> None:
    """The same of one section [bytes] u8."""
    encoding.check_values(part_arrays(section.cpu().numpy().data, shape, encoding), shape)
