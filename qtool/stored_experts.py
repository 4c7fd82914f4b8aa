"""The experts of a folder of safetensors, one at a time: stored apart or together, under whatever names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from formats.experts import FusedTensor, fused_tensor
from formats.skeleton import set_tensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def fused_names(model: PreTrainedModel) -> dict[str, Any]:
    """The tensors of `model` under the names that transformers' own has: of all experts together."""
    state: dict[str, Any] = model.state_dict()
    named = {name: fused_tensor(model, name) for name in state}
    return {part.name if (part := named[name]) else name: tensor for name, tensor in state.items()}


def split_parts(model: PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, dict[int, str]], set[str]]:
    """(fused tensor -> expert -> the name that its part has here, the names of all other tensors)."""
    parts: dict[str, dict[int, str]] = {}
    others = set()
    for name in names:
        part = fused_tensor(model, name)
        if part is None:
            others.add(name)
        else:
            parts.setdefault(part.name, {})[part.expert] = name
    return parts, others


def read_experts(
    model: PreTrainedModel,
    fused: str,
    wanted: Mapping[int, str],
    slices: Mapping[str, Any],
    converter_of: Callable[[str], tuple[WeightConverter, str] | None],
) -> None:
    """Assign the parameters `wanted` (by expert) in float32, which are parts of the tensor `fused`.

    slices: what is stored of it, by key; converter_of: of a key, transformers' converter and which of its patterns.
    """
    by_expert = _by_expert(slices)
    whole: Tensor | None = None
    for expert, name in sorted(wanted.items()):
        if by_expert is not None:
            keys = by_expert.get(expert, [])
            value = _converted(fused, {key: slices[key] for key in keys}, converter_of, model)[0] if keys else None
        elif len(slices) == 1 and converter_of(next(iter(slices))) is None:
            value = next(iter(slices.values()))[expert]
        else:
            whole = _converted(fused, slices, converter_of, model) if whole is None else whole
            value = whole[expert]
        if value is not None:
            is_transposed = value.dim() == 2 and model.get_submodule(fused.rpartition(".")[0]).is_transposed
            set_tensor(model, name, (value.T if is_transposed else value).float().contiguous())


def key_of_expert(keys: Iterable[str], part: FusedTensor) -> str | None:
    """A key under which something of this expert is stored."""
    keys = list(keys)
    by_expert = _by_expert(keys)
    return next(iter(keys if by_expert is None else by_expert.get(part.expert, [])), None)


def _by_expert(keys: Iterable[str]) -> dict[int, list[str]] | None:
    """Expert -> the keys of its own tensors, the expert being the one number that keys differ in; None if none is."""
    numbers = {key: _NUMBER.findall(key) for key in keys}
    columns = list(zip(*numbers.values(), strict=False))
    differing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1:
        return None
    found: dict[int, list[str]] = {}
    for key, own in numbers.items():
        found.setdefault(int(own[differing[0]]), []).append(key)
    return found


def _converted(
    fused: str,
    slices: Mapping[str, Any],
    converter_of: Callable[[str], tuple[WeightConverter, str] | None],
    model: PreTrainedModel,
) -> Tensor:
    """The tensor `fused`, or of one expert alone a tensor [1, ...], out of what is stored."""
    made: WeightConverter | None = None
    for key, stored in sorted(slices.items()):
        found = converter_of(key)
        assert found is not None  # several keys make one tensor
        made = made or copy.deepcopy(found[0])
        made.add_tensor(fused, key, found[1], cast(Any, partial(_whole, stored)))
    assert made is not None
    [tensor] = made.convert(fused, model=model, config=model.config).values()
    return cast(Tensor, tensor)


def _whole(stored: Any) -> Any:
    return stored[...]
