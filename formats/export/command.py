"""The command that a file's recipe stands for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

EFFORTS = {6: "fast", 8: "default", 9: "best"}
"""By the path bits of a trellis."""


def compress_command(recipe: Mapping[str, Any], model: str) -> str | None:
    """A `qtool compress` of `model` that has this recipe; None where the recipe is not as qtool writes it, or has the
    widths of an engine to choose from, which it does not name.

    A calibration text is named as the file names it: without its folder.
    """
    try:
        words = ["qtool", "compress", model, *_options(recipe)]
    except (TypeError, ValueError, AttributeError, KeyError):
        return None
    command = shlex.join(words)
    return command if command.isprintable() else None


def _options(recipe: Mapping[str, Any]) -> Iterator[str]:
    if recipe.get("widths"):
        raise ValueError("widths are chosen by --for")
    linears, experts, target = recipe["linears"], recipe["experts"], recipe["target"]
    yield from _linears(linears, is_targeted=target is not None)
    if experts is not None:
        yield from ("--expert-format", experts["format"])
        yield from _ternary_grid(experts)
    if linears["method"] == "gptq" and (experts is None or experts["percdamp"] == linears["percdamp"]):
        yield from _given("percdamp", linears["percdamp"])  # where experts have another, none was given
    if target is not None:
        size = target["size_bytes"]
        yield from ("--target-size", str(size)) if size else ("--target-bits", str(target["bits"]))
    if recipe["embeddings"]:
        yield from ("--embeddings", str(recipe["embeddings"]))
    for name in ("fused", "independent"):
        if recipe[name]:
            yield f"--{name}"
    for pattern, bits in recipe["layers"]:
        yield from ("--layer", f"{pattern}={bits}")
    for pattern in recipe["ignore"]:
        yield from ("--ignore", pattern)
    if recipe["calibration"] is not None:
        for name in ("text_field", "samples", "seq_len", "seed", "min_expert_tokens"):
            yield from _given(name, recipe["calibration"][name])
        yield from ("--calibration", recipe["calibration"]["source"])


def _linears(spec: Mapping[str, Any], *, is_targeted: bool) -> Iterator[str]:
    yield from ("--method", spec["method"])
    if spec["method"] == "int8":
        name = "outlier_features" if spec["outlier_features"] else "activation_threshold"
        yield from _given(name, spec[name])
        return
    yield from ("--format", spec["format"])
    if spec["format"] == "ternary":
        yield from _ternary_grid(spec)
        yield from (_switch(name, True) for name in ("act_order", "input_scales") if spec[name])
        return
    if not is_targeted:
        yield from _given("bits", spec["bits"])
    if not spec["format"].startswith("q_"):  # llama.cpp's blocks have their own
        yield from _given("group_size", spec["group_size"])
    if spec["format"] == "int":
        yield "--sym" if spec["symmetric"] else "--asym"
    if spec["stat_bits"]:
        yield from (*_given("stat_bits", spec["stat_bits"]), *_given("stat_rows", spec["stat_rows"]))
    if spec["double_quant"]:
        yield "--double-quant"
    yield from _outliers(spec)
    if spec["format"] == "trellis":
        yield from ("--effort", EFFORTS[spec["memory"]])
    if spec["method"] == "gptq":
        yield from (_switch(name, spec[name]) for name in ("act_order", "input_scales"))
        if spec["format"] != "trellis":
            yield _switch("scale_search", spec["scale_search"])


def _outliers(spec: Mapping[str, Any]) -> Iterator[str]:
    if spec["outliers"]:
        yield from _given("outliers", spec["outliers"])
    by_default = spec["format"] == "trellis" and spec["method"] == "gptq"  # unless a share or a threshold is given
    is_off = by_default and not (spec["outliers"] or spec["outliers_pay"])
    if spec["outlier_threshold"] or is_off:
        yield from _given("outlier_threshold", spec["outlier_threshold"])


def _ternary_grid(spec: Mapping[str, Any]) -> Iterator[str]:
    yield from ("--ternary-grid", "mse" if spec["scale_search"] else "minmax")


def _switch(name: str, is_on: bool) -> str:
    return ("--" if is_on else "--no-") + name.replace("_", "-")


def _given(name: str, value: Any) -> Iterator[str]:
    yield from ("--" + name.replace("_", "-"), str(value))
