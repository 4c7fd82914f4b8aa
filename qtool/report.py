"""What a file holds, as a dict for `--json` and as text for people."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from formats.block_lists import list_names
from formats.encoding import Dense
from formats.errors import FormatError
from formats.header import Header, TensorEntry
from formats.reader import QtmFile
from qtool.sizes import bits_per_weight, format_bytes, stored_bytes

NUMBER = re.compile(r"(?<=[._])\d+(?=\.)")
"""Of a block, or of an expert (`experts.3`, `expert_3`), in a tensor's name."""
TROUBLE = {
    "harder_damped": "damped harder",
    "dropped_tokens": "left out tokens that overflow",
    "rounded": "rounded to nearest: its Hessian cannot be factored",
    "uncalibrated": "saw no calibration token",
}
"""What a run tells of single layers, by the member of `quality` that names them."""


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything the header says and what follows from it; sections are not read."""
    with QtmFile.open(Path(path)) as file:
        return inspect_open(file)


def inspect_open(file: QtmFile) -> dict[str, Any]:
    """As `inspect_file`, for a file that is open."""
    entries = list(file.tensors.values())
    parameters = sum(math.prod(e.shape) for e in entries)
    quantized = sum(math.prod(e.shape) for e in entries if not isinstance(e.encoding, Dense))
    return {
        "format_version": ".".join(map(str, file.version)),
        "file_bytes": file.n_bytes,
        "model_type": file.header.model.get("model_type"),
        "parameters": parameters,
        "bits_per_weight": bits_per_weight((e.encoding, e.shape) for e in block_linears(file.header)),
        "quantized_share": quantized / parameters if parameters else 0.0,
        "recipe": dict(file.header.recipe),
        "quality": dict(file.header.quality),
        "provenance": dict(file.header.provenance),
        "files": [{"name": f.name, "bytes": f.n_bytes} for f in file.files.values()],
        "tensors": [_tensor_row(e) for e in entries],
    }


def block_prefixes(header: Header) -> tuple[str, ...]:
    """What the names of the blocks' tensors start with: `model.layers.`"""
    return tuple(f"{name}." for name in list_names(header.model))


def block_linears(header: Header) -> list[TensorEntry]:
    """The matrices of the blocks, which bits per weight are counted over."""
    blocks = block_prefixes(header)
    return [entry for entry in header.tensors if entry.name.startswith(blocks) and len(entry.shape) == 2]


def format_inspection(found: dict[str, Any], *, tensors: bool) -> str:
    """The same for people: a few lines, and with `tensors` one line for each. FormatError as `summarize`."""
    lines = [f"{name:15}  {text}" for name, text in summarize(found)]
    text = "\n".join(lines + (["", *_tensor_table(found["tensors"])] if tensors else []))
    # Names are free of control characters (SPEC 5.2), the free objects need not be: they could drive the terminal.
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def summarize(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of the whole file, each with its name.

    FormatError when the header's free objects are not as qtool writes them.
    """
    try:
        return _summary(found)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise FormatError(f"header: recipe or quality are not as qtool writes them: {error} (SPEC 3.4)") from error


def _summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    recipe, rows = found["recipe"], found["tensors"]
    linears, calibration = recipe.get("linears", {}), recipe.get("calibration") or {}
    lines = [
        ("model", f"{found['model_type']}, {found['parameters']:,} parameters"),
        ("file", f"{format_bytes(found['file_bytes'])}, format {found['format_version']}"),
        ("bits per weight", f"{found['bits_per_weight']:.3f} (block linears, everything stored for them counted)"),
        ("quantized", f"{found['quantized_share']:.2%} of the parameters"),
        ("recipe", _describe_recipe(recipe, linears)),
        ("calibration", _describe_calibration(calibration)),
    ]
    if "imported" not in recipe:  # whose error nobody here knows
        lines.append(("relative error", f"{found['quality'].get('mean_relative_error', 0):.3e} on average"))
    for key, text in TROUBLE.items():
        if key != "dropped_tokens":  # whose number is told
            lines += [("warning", f"{name} {text}") for name in found["quality"].get(key, ())]
    dropped = found["quality"].get("dropped_tokens", {})
    lines += [("warning", f"{name}: {n} tokens with NaN or infinity left out") for name, n in dropped.items()]
    lines += _describe_experts(found["quality"].get("experts") or {})
    dense = [row for row in rows if row["encoding"] == "dense"]
    lines.append(("left dense", f"{len(dense)} tensors: {fold_names(row['name'] for row in dense)}"))
    if "report" in found:
        lines.append(("report", found["report"]))
    return lines


def _describe_experts(mixtures: dict[str, Any]) -> list[tuple[str, str]]:
    """How well the calibration text covered them."""
    if not mixtures:
        return []
    tokens = [n for of_one in mixtures.values() for n in of_one.get("tokens", ())]
    if not tokens:
        return []
    pooled = sum(len(of_one["pooled"]) for of_one in mixtures.values())
    told = f"{len(tokens)} in {len(mixtures)} blocks, {min(tokens)} to {max(tokens)} tokens each"
    return [("experts", f"{told}; {pooled} calibrated on what all of their block's read" if pooled else told)]


def _describe_recipe(recipe: dict[str, Any], linears: dict[str, Any]) -> str:
    if "imported" in recipe:
        return f"taken over as it was ({recipe['imported']})"
    words = [linears.get("method"), linears.get("format", "int"), _describe_bits(recipe, linears)]
    words.append("a scale per row" if linears.get("group_size") == -1 else f"group size {linears.get('group_size')}")
    if linears.get("format", "int") == "int":
        words.append("symmetric" if linears.get("symmetric") else "asymmetric")
    if linears.get("stat_bits"):
        words.append(f"statistics in {linears['stat_bits']} bits")
    if linears.get("double_quant"):
        words.append("scales in 8 bits")
    words += [*_describe_outliers(linears), *_describe_exceptions(recipe)]
    if recipe.get("experts"):
        words.append(f"experts {recipe['experts']['format']}")
    return ", ".join(map(str, [*words, _describe_embeddings(recipe.get("embeddings"))]))


def _describe_embeddings(bits: Any) -> str:
    if bits == 16:
        return "embeddings as they were"
    return f"embeddings {bits} bits" if bits else "embeddings by the target"


def _describe_bits(recipe: dict[str, Any], linears: dict[str, Any]) -> str:
    target = recipe.get("target")
    if target is None:
        return f"{linears.get('bits')} bits"
    goal = format_bytes(target["size_bytes"]) if target["size_bytes"] else f"{target['bits']:g} bits per weight"
    return f"bits spread for {goal}" + (", layers of one input alike" if recipe.get("fused") else "")


def _describe_outliers(linears: dict[str, Any]) -> list[str]:
    if linears.get("method") == "int8":
        largest, threshold = linears.get("outlier_features"), linears.get("activation_threshold")
        return [f"{largest} largest inputs in 16 bits" if largest else f"inputs from {threshold:g} in 16 bits"]
    if linears.get("outliers"):
        return [f"{100 * linears['outliers']:g}% outliers"]
    if linears.get("outliers_pay"):
        return ["outliers where they pay"]
    return [f"outlier threshold {linears['outlier_threshold']:g}"] if linears.get("outlier_threshold") else []


def _describe_exceptions(recipe: dict[str, Any]) -> list[str]:
    given = [f"{pattern} {bits} bits" for pattern, bits in recipe.get("layers") or ()]
    return given + [f"{pattern} as it was" for pattern in recipe.get("ignore") or ()]


def _describe_calibration(calibration: dict[str, Any]) -> str:
    if not calibration.get("source"):
        return "none"
    return "{source}, {samples} windows of {seq_len} tokens, seed {seed}".format(**calibration)


def fold_names(names: Iterable[str]) -> str:
    """Names with the block numbers folded together: model.layers.*.input_layernorm.weight ×30."""
    folded = Counter(NUMBER.sub("*", name) for name in names)
    return ", ".join(name if n == 1 else f"{name} ×{n}" for name, n in folded.items())


def _tensor_table(rows: list[dict[str, Any]]) -> list[str]:
    width = max((len(row["name"]) for row in rows), default=4)
    lines = [
        f"{'name':{width}}  {'shape':>16}  {'encoding':12}  {'bits':>4}  {'group':>5}  {'outliers':>8}  "
        f"{'bytes':>12}  error"
    ]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.2e}"
        # Of ternary values, what their streams take: a whole number would say 1 of any of them.
        bits = f"{8 * row['bytes'] / math.prod(row['shape']):.2f}" if "ternary" in row["encoding"] else row["bits"]
        cells = f"{row['encoding']:12}  {bits:>4}  {row['group_size'] or '-':>5}  {row['outliers'] or '-':>8}"
        lines.append(f"{row['name']:{width}}  {shape:>16}  {cells}  {row['bytes']:>12,}  {error}".rstrip())
    return lines


def _tensor_row(entry: TensorEntry) -> dict[str, Any]:
    encoding = entry.encoding
    bits, group_size, outliers = encoding.describe(entry.shape)
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "encoding": encoding.name,
        "bits": bits,
        "group_size": group_size,
        "outliers": outliers,
        "settings": {name: value for name, value in encoding.fields().items() if name != "encoding"},
        "bytes": stored_bytes(encoding, entry.shape),
        "relative_error": entry.relative_error,
    }
