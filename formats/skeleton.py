"""A transformers model without weights: the shape that a file or a checkpoint is poured into.

Parameters stay on the meta device until somebody assigns them; the few buffers that no file
stores (rotary frequencies, embedding scales) are computed from the config at once.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from formats.errors import FormatError
from formats.experts import separate_experts
from formats.listed_experts import separate_listed_experts
from formats.strict_json import brief

# An attention implementation can be a kernel on the hub, which transformers would fetch and run.
_REFERENCE = re.compile(r"auto_map|_?(attn|experts)_implementation|init_inputs|vocab|merges|.*_files?", re.DOTALL)
MAX_DERIVED_BYTES = 2**30
"""Buffers computed from the config alone: the tables of any model are far smaller."""
MAX_REASON = 200
"""Characters kept of a message that is not ours: transformers can list all of its 400 architectures."""


def config_from_dict(values: dict[str, Any]) -> Any:
    """The transformers config of a `config.json` dict. No code of the model's own is ever run."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise FormatError("model config has no model_type: not a transformers model")
    try:
        # What is left can only build classes that transformers ships.
        return AutoConfig.for_model(**without_references(values))
    except Exception as error:  # transformers raises whatever its config classes and their checks do
        raise FormatError(
            f"model_type={brief(model_type)}: not a config transformers takes: {one_line(error)}"
        ) from error


def without_references(value: Any) -> Any:
    """A config without what names code, or a path to read: such as `auto_map` and `vocab_file`."""
    if isinstance(value, list):
        return [without_references(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: without_references(item) for key, item in value.items() if not _REFERENCE.fullmatch(str(key))}


def build_skeleton(config: Any, stored: Container[str] = ()) -> PreTrainedModel:
    """The model of `config` in float32 and eval mode, parameters on meta, derived buffers real, experts taken apart.

    stored: names of tensors; those of them that hold all experts of a mixture stay as they are.
    """
    auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        separate_experts(model, stored)
        separate_listed_experts(model)
        model.eval()
        _check_derived_buffers(model)
        for module in model.modules():
            _init_derived_buffers(model, module)
        model.tie_weights()
    except Exception as error:  # a config can be wrong in as many ways as there are architectures
        reason, kind = (
            one_line(error),
            "encoder-decoder for text" if is_encoder_decoder(config) else "causal language model",
        )
        raise FormatError(
            f"model_type={config.model_type!r}: no {kind} can be built from its config: {reason}"
        ) from error
    return model  # type: ignore[no-any-return]


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model of `config` reads a text with one stack of blocks and writes another with a second one."""
    return bool(getattr(config, "is_encoder_decoder", False))


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give parameters that are tied to others of `model` values of their own, on meta."""
    names = set(names)
    for name in names:
        set_tensor(model, name, torch.empty_like(model.get_parameter(name), device="meta"))
        model.all_tied_weights_keys.pop(name, None)
    for path, part in model.named_modules() if names else ():
        if isinstance(part, PreTrainedModel):  # each has ties of its own, which are looked up again
            ties = part.get_expanded_tied_weights_keys().items()
            part._tied_weights_keys = {a: b for a, b in ties if f"{path}.{a}".lstrip(".") not in names}


def second_names(model: nn.Module) -> list[str]:
    """Of all tied parameters, the names but the first, under which they are stored."""
    return [name for names in parameter_names(model).values() for name in names[1:]]


def _derived_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _check_derived_buffers(model: nn.Module) -> None:
    """They are the one thing of a skeleton that takes memory."""
    n_bytes = sum(b.nbytes for module in model.modules() for b in _derived_buffers(module).values())
    if n_bytes > MAX_DERIVED_BYTES:
        raise FormatError(f"it implies tables of {n_bytes} bytes, at most {MAX_DERIVED_BYTES}")


def _init_derived_buffers(model: PreTrainedModel, module: nn.Module) -> None:
    derived = _derived_buffers(module)
    if not derived:
        return
    for name, buffer in derived.items():
        module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():
        model._init_weights(module)  # transformers' own rule for what is derived; parameters stay on meta


def split_name(name: str) -> tuple[str, str]:
    """`a.b.weight` -> (`a.b`, `weight`)."""
    owner, _, leaf = name.rpartition(".")
    return owner, leaf


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter or buffer `name` of `model` by `value`, whatever device it was on."""
    owner, leaf = split_name(name)
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's Conv1D, a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one 2-D weight: torch's Linear, what behaves like it, or GPT-2's Conv1D."""
    if is_transposed_linear(module) or type(module).forward is nn.Linear.forward:
        return True
    kind: Any = type(module)
    return isinstance(module, nn.Linear) and _behaves_as_linear(kind, module.bias is not None)


@cache
def _behaves_as_linear(kind: Any, has_bias: bool) -> bool:
    """Whether a subclass with a forward of its own still computes x Wᵀ + b: Falcon's does, a router may not."""
    probe = kind.__new__(kind)
    nn.Module.__init__(probe)
    probe.in_features, probe.out_features = 3, 2
    probe.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]]))
    probe.bias = nn.Parameter(torch.tensor([0.25, -8.0])) if has_bias else None
    x = torch.tensor([[1.0, 2.0, -3.0], [-1.0, 0.5, 2.0]])
    try:
        with torch.no_grad():
            y = probe(x)
    except Exception:  # a forward that needs more than a weight is not a linear's
        return False
    return isinstance(y, torch.Tensor) and torch.equal(y, nn.functional.linear(x, probe.weight, probe.bias))


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """First name of every parameter -> all its names: a tied one is stored once, under its first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: group for group in names.values()}


def one_line(error: BaseException) -> str:
    """What an exception of transformers says, on one line of readable length."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= MAX_REASON else f"{words[:MAX_REASON]} ..."
