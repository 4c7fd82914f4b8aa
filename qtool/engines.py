"""Recipes for other engines (`compress --for`): such that an export is exact, and their fast kernels take it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from formats.experts import expert_of
from formats.export.gptq import MERGED
from formats.skeleton import is_transposed_linear
from qtool.errors import ConfigError, either
from qtool.model import BlockwiseModel
from qtool.recipe import GGML

ROW = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRules:
    """What an engine takes. The first of several is what is chosen where the user leaves it open."""

    bits: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True,)
    group_sizes: tuple[int, ...] = (128, 64, 32, ROW)
    embeddings: tuple[int, ...] = (16,)
    multiple: tuple[int, int] = (1, 1)  # of outputs and of inputs
    mixes: bool = True  # whether layers may have different bits
    formats: tuple[str, ...] = ("int",)
    widths: tuple[int, ...] = ()  # that layers and a target may have besides; none: those of `bits`
    fuses: bool = True  # whether a target gives one width to what reads one input
    merges: bool = False  # whether it runs what MERGED names as one matrix, which has one width or none


ENGINES: dict[str, EngineRules] = {
    # The fast kernel behind the first three, MARLIN, has no zeros; its tiles are 64 outputs by 128 inputs.
    "gptq": EngineRules(bits=(4, 2, 3, 8), multiple=(32, 32)),
    "vllm": EngineRules(bits=(4, 8), multiple=(64, 128), merges=True),
    "compressed-tensors": EngineRules(bits=(4, 2, 3, 5, 6, 7, 8)),
    "awq": EngineRules(bits=(4,), symmetric=(False, True), multiple=(8, 1), mixes=False),
    **{
        f"gguf:q{bits}_{form[-1]}": EngineRules(
            bits=(bits,),
            formats=(form,),
            widths=tuple(GGML[form]),
            symmetric=(),
            group_sizes=(),
            embeddings=(8, 16),
            multiple=(1, 32),
            fuses=False,
        )
        for form, widths in GGML.items()
        for bits in widths
    },
}
"""By what `--for` is given."""

NEEDED: dict[str, tuple[Any, ...]] = {
    "method": ("gptq", "rtn"),
    "input_scales": (False,),
    "stat_bits": (0,),
    "stat_rows": (),
    "double_quant": (False,),
    "outliers": (),
    "outlier_threshold": (0.0,),
    "outlier_features": (),
    "activation_threshold": (),
    "expert_format": (),
    "ternary_grid": (),
}
"""What every engine asks of an option, if it is given at all; an empty tuple: that it is not."""


def rules_of(engine: str) -> EngineRules:
    if engine not in ENGINES:
        if engine.startswith("gguf:"):
            exact = ", ".join(name for name in ENGINES if name.startswith("gguf:"))
            raise ConfigError(f"--for {engine}: only {exact} can be exact; export --lossy makes others of any file")
        raise ConfigError(f"--for {engine}: must be one of {', '.join(ENGINES)}")
    return ENGINES[engine]


def options_for(engine: str, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The options of a command, what is open in them chosen for an engine; ConfigError where two do not agree.

    options: as `build_recipe` takes them; shapes: [out, in] of every linear of the blocks
    """
    rules = rules_of(engine)
    for name, allowed in NEEDED.items():
        _check(engine, name, options.get(name), allowed)
    _check(engine, "number_format", options.get("number_format"), rules.formats)
    _check(engine, "symmetric", options.get("symmetric"), rules.symmetric)
    _check(engine, "embeddings", options.get("embeddings"), rules.embeddings)
    _check(engine, "bits", options.get("bits"), rules.bits)
    _check_layers(engine, rules, options)
    with suppress(re.error):  # which the recipe refuses, by name
        if rules.merges:
            _check_merged(engine, rules, options, shapes)
        shapes = {n: shape for n, shape in shapes.items() if not any(re.search(p, n) for p in options["ignore"])}
    _check_shapes(engine, rules, shapes)
    chosen: dict[str, Any] = {"embeddings": rules.embeddings[0], "number_format": rules.formats[0]}
    if not rules.group_sizes:
        _check(engine, "group_size", options.get("group_size"), ())
    else:
        chosen["group_size"] = _group_size(engine, rules, options.get("group_size"), shapes)
    if rules.symmetric and options.get("symmetric") is None:
        chosen["symmetric"] = rules.symmetric[0]
    if options["method"] != "rtn":
        chosen["input_scales"] = False  # the solver's; rounding to nearest has none
    if _has_target(options):
        chosen |= {"fused": rules.fuses, "widths": tuple(sorted(rules.widths or rules.bits))}
    elif options.get("bits") is None:
        chosen["bits"] = rules.bits[0]
    return {**options, **{name: value for name, value in chosen.items() if options.get(name) in (None, False)}}


def shapes_of(model: BlockwiseModel) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear of the blocks, by the name of its weight."""
    found = {}
    for index in range(len(model.blocks)):
        for name, module in model.linears(index).items():
            shape = tuple(cast(Tensor, module.weight).shape)
            n_out, n_in = shape[::-1] if is_transposed_linear(module) else shape
            found[f"{name}.weight"] = (n_out, n_in)
    return found


def _check(engine: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that was given and is none of those allowed."""
    if value is None or value in allowed:
        return
    if not allowed:
        raise ConfigError(f"--for {engine}: has nothing like {_given(name, value)}; leave one of the two out")
    goes = either(_given(name, own) for own in allowed)
    raise ConfigError(f"--for {engine}: goes with {goes}, not with {_given(name, value)}; leave one of the two out")


def _check_layers(engine: str, rules: EngineRules, options: Mapping[str, Any]) -> None:
    if not rules.mixes:
        for name in ("target_size", "target_bits"):
            if options.get(name) is not None:
                given = _given(name, options[name])
                raise ConfigError(f"--for {engine}: has one width, {given} mixes them; leave one of the two out")
    for text in options["layers"]:
        bits = text.rpartition("=")[2]
        allowed = rules.widths or (rules.bits if rules.mixes else rules.bits[:1])
        if bits.isdigit() and int(bits) not in allowed:
            raise ConfigError(f"--for {engine}: bits must be {either(allowed)}, --layer {text} is something else")


def _check_merged(engine: str, rules: EngineRules, options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse --layer and --ignore where they tell apart what the engine runs as one matrix."""
    treated = {name: _treatment(name, rules, options) for name in names}
    _check_experts(engine, treated)
    for first in treated:
        for lead, *rest in MERGED.values():
            own = [first, *(f"{first.removesuffix(f'{lead}.weight')}{part}.weight" for part in rest)]
            if not first.endswith(f".{lead}.weight") or not treated.keys() >= set(own):
                continue
            if len({treated[name][0] for name in own}) > 1:
                option = next(option for _, option in (treated[name] for name in own) if option)
                raise ConfigError(
                    f"--for {engine}: runs {either(own, 'and')} as one matrix, of which {option} takes a part; "
                    "let its pattern match all of them or none"
                )


def _check_experts(engine: str, treated: Mapping[str, tuple[str, str]]) -> None:
    """Refuse what tells apart the experts of one mixture, or parts of them."""
    known: dict[str, tuple[str, str]] = {}
    for name, (bits, option) in treated.items():
        if (part := expert_of(name)) is not None:
            first_bits, first_option = known.setdefault(part[0], (bits, option))
            if bits != first_bits:
                raise ConfigError(
                    f"--for {engine}: runs all experts of {part[0]} as one, of which {option or first_option} takes "
                    "a part; let its pattern match all of them or none"
                )


def _treatment(name: str, rules: EngineRules, options: Mapping[str, Any]) -> tuple[str, str]:
    """(bits of a tensor, or none, or a target's choice; the option that says so)."""
    for pattern in options["ignore"]:
        if re.search(pattern, name):
            return "none", f"--ignore {pattern}"
    for text in options["layers"]:
        pattern, _, bits = text.rpartition("=")
        if re.search(pattern, name):
            return str(int(bits)) if bits.isdigit() else bits, f"--layer {text}"
    return "chosen" if _has_target(options) else f"{options.get('bits') or rules.bits[0]:g}", ""


def _has_target(options: Mapping[str, Any]) -> bool:
    return options.get("target_size") is not None or options.get("target_bits") is not None


def _check_shapes(engine: str, rules: EngineRules, shapes: Mapping[str, tuple[int, int]]) -> None:
    other = ", or take --for gptq, which slower kernels run" if engine == "vllm" else ""
    for name, shape in shapes.items():
        for size, multiple, what in zip(shape, rules.multiple, ("outputs", "inputs"), strict=True):
            if size % multiple:
                raise ConfigError(
                    f"--for {engine}: {name} has {size} {what}, the engine takes multiples of {multiple}; "
                    f"leave it dense by --ignore{other}"
                )


def _group_size(engine: str, rules: EngineRules, given: int | None, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The largest that cuts every row into whole groups."""
    inputs = {n_in for _, n_in in shapes.values()}
    if given is not None and given not in rules.group_sizes:
        raise ConfigError(
            f"--for {engine}: the engine has groups of {either(rules.group_sizes)}, not of --group-size {given}"
        )
    for size in rules.group_sizes if given is None else (given,):
        if size == ROW or not any(n_in % size for n_in in inputs):
            return size
    wrong = next(name for name, (_, n_in) in shapes.items() if n_in % (given or rules.group_sizes[-1]))
    raise ConfigError(
        f"--for {engine}: {wrong} has {shapes[wrong][1]} inputs, which groups of {given or rules.group_sizes[-1]} "
        "do not divide; give another --group-size, or leave it dense by --ignore"
    )


def _given(name: str, value: Any) -> str:
    """An option as it is written."""
    if name == "symmetric":
        return "--sym" if value else "--asym"
    option = {"number_format": "format"}.get(name, name).replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value:g}" if isinstance(value, float) else f"--{option} {value}"
