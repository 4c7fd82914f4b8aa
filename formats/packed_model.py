"""A transformers model with room for sections, and the check of what is put into it: what the plug-in does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from formats.encoding import MatrixEncoding, Shape, encoding_from_fields
from formats.errors import FormatError, error_context
from formats.modules import QuantLinear, owner_of, put_section, takes_sections
from formats.section import part_arrays
from formats.skeleton import is_transposed_linear, split_name, untie
from formats.strict_json import as_object, brief


def make_room(model: PreTrainedModel, weights: Any, dtype: torch.dtype) -> list[str]:
    """Let the named weights of a model on meta be empty sections; returns the names of the parameters that hold them.

    weights: name -> shape and fields of the encoding (SPEC 5.1), as `config.json` has them; checked here. Weights that
    are tied to one another share a section, in the file and in memory: under the first name alone is it stored.
    """
    with error_context("config.json: quantization_config: weights"):
        entries = as_object("its content", weights)
    # Some configs tie a head that is another matrix all the same: both are packed then.
    untie(model, [name for name, source in model.all_tied_weights_keys.items() if {name, source} <= entries.keys()])
    tied = dict(model.all_tied_weights_keys)
    sections: dict[str, str] = {}
    stored = []
    with error_context("config.json: quantization_config: weights"):
        for name, fields in entries.items():
            with error_context(brief(name)):
                if name in tied:
                    raise FormatError(f"is tied to {tied[name]!r}; it is stored under that name alone")
                encoding, shape = _encoding_of(as_object("its content", fields))
                for alias in (name, *(target for target, source in tied.items() if source == name)):
                    sections[alias] = _put_empty(model, alias, encoding, shape, dtype)
                stored.append(sections[name])
    # What is tied from now on, also when the model is saved, or tied anew.
    ties = {sections.get(target, target): sections.get(source, source) for target, source in tied.items()}
    model.all_tied_weights_keys = ties
    if ties != tied:
        cast(Any, model)._tied_weights_keys = ties
    return stored


def _encoding_of(fields: Mapping[str, Any]) -> tuple[MatrixEncoding, Shape]:
    shape = fields.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise FormatError(f"shape={brief(shape)}: must be two positive numbers")
    encoding = encoding_from_fields(fields)
    if not isinstance(encoding, MatrixEncoding):
        raise FormatError(f"{encoding.name}: is no matrix")
    return encoding, (shape[0], shape[1])


def _put_empty(model: PreTrainedModel, name: str, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> str:
    try:
        module = model.get_submodule(split_name(name)[0])
    except AttributeError as error:
        raise FormatError("the model's config has no such tensor (SPEC 3.4.1)") from error
    owner_of(model, name, shape[::-1] if is_transposed_linear(module) else shape)
    if not takes_sections(module, name):
        raise FormatError("is no linear layer or embedding: nothing multiplies by a section there")
    section = torch.empty(encoding.section_bytes(shape), dtype=torch.uint8, device="meta")
    return put_section(model, name, section, encoding, shape, dtype)


def stored_names(files: Iterable[str]) -> set[str]:
    """The names of all tensors in these files of safetensors."""
    names: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def check_sections(model: PreTrainedModel, names: Iterable[str], files: Iterable[str]) -> None:
    """FormatError unless the files hold every section as its encoding says: a kernel relies on it.

    Before transformers loads them, which makes up what is missing, and may leave some on disk until they are used.
    """
    missing = dict.fromkeys(names)
    for path in files:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            for name in [name for name in missing if name in held]:
                del missing[name]
                module = cast(QuantLinear, model.get_submodule(split_name(name)[0]))
                with error_context(f"{path}: {name}"):
                    header = file.get_slice(name)
                    if header.get_dtype() != "U8" or header.get_shape() != [len(module.section)]:
                        found = f"{header.get_dtype()} {header.get_shape()}"
                        raise FormatError(f"is {found}, must be {len(module.section)} bytes (U8)")
                    _check_section(file.get_tensor(name), module)
    if missing:
        raise FormatError(f"tensor {next(iter(missing))!r} is missing; config.json says that it is packed")


def _check_section(section: Tensor, module: QuantLinear) -> None:
    shape = module.out_features, module.in_features
    module.encoding.check_values(part_arrays(section.numpy().data, shape, module.encoding), shape)
