"""What a file holds, as a dict for `--json` and as text for people."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from formats.encoding import Uniform
from formats.errors import FormatError
from formats.header import TensorEntry
from formats.reader import QtmFile
from qtool.sizes import bits_per_weight, format_bytes, stored_bytes

DENSE_BITS = {"F16": 16, "BF16": 16, "F32": 32}


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything the header says and what follows from it; sections are not read."""
    with QtmFile.open(Path(path)) as file:
        entries = list(file.tensors.values())
        parameters = sum(math.prod(e.shape) for e in entries)
        quantized = sum(math.prod(e.shape) for e in entries if isinstance(e.encoding, Uniform))
        blocks = f"{file.header.model.get('blocks')}."
        linears = [e for e in entries if e.name.startswith(blocks) and len(e.shape) == 2]
        return {
            "format_version": ".".join(map(str, file.version)),
            "file_bytes": file.n_bytes,
            "model_type": file.header.model.get("model_type"),
            "parameters": parameters,
            "bits_per_weight": bits_per_weight((e.encoding, e.shape) for e in linears),
            "quantized_share": quantized / parameters if parameters else 0.0,
            "recipe": dict(file.header.recipe),
            "quality": dict(file.header.quality),
            "provenance": dict(file.header.provenance),
            "files": [{"name": f.name, "bytes": f.n_bytes} for f in file.files.values()],
            "tensors": [_tensor_row(e) for e in entries],
        }


def format_inspection(found: dict[str, Any], *, tensors: bool) -> str:
    """The same for people: a few lines, and with `tensors` one line for each.

    FormatError when the header's free objects are not as qtool writes them.
    """
    try:
        text = "\n".join(_summary(found) + (["", *_tensor_table(found["tensors"])] if tensors else []))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise FormatError(f"header: recipe or quality are not as qtool writes them: {error} (SPEC 3.4)") from error
    # Names are free of control characters (SPEC 5.2), the free objects need not be: they could drive the terminal.
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def _summary(found: dict[str, Any]) -> list[str]:
    recipe, rows = found["recipe"], found["tensors"]
    linears, calibration = recipe.get("linears", {}), recipe.get("calibration") or {}
    lines = [
        f"model            {found['model_type']}, {found['parameters']:,} parameters",
        f"file             {format_bytes(found['file_bytes'])}, format {found['format_version']}",
        f"bits per weight  {found['bits_per_weight']:.3f} (block linears, everything stored for them counted)",
        f"quantized        {found['quantized_share']:.2%} of the parameters",
        f"recipe           {_describe_recipe(linears, recipe.get('embeddings'))}",
        f"calibration      {_describe_calibration(calibration)}",
        f"relative error   {found['quality'].get('mean_relative_error', 0):.3e} on average",
    ]
    for key, text in (("harder_damped", "damped harder"), ("uncalibrated", "saw no calibration token")):
        lines += [f"warning          {name} {text}" for name in found["quality"].get(key, ())]
    dropped = found["quality"].get("dropped_tokens", {})
    lines += [f"warning          {name}: {n} tokens with NaN or infinity left out" for name, n in dropped.items()]
    dense = [row for row in rows if row["encoding"] == "dense"]
    lines.append(f"left dense       {len(dense)} tensors: {fold_names(row['name'] for row in dense)}")
    return lines


def _describe_recipe(linears: dict[str, Any], embeddings: Any) -> str:
    words = [linears.get("method"), f"{linears.get('bits')} bits", f"group size {linears.get('group_size')}"]
    words.append("symmetric" if linears.get("symmetric") else "asymmetric")
    words.append("embeddings as they were" if embeddings == 16 else f"embeddings {embeddings} bits")
    return ", ".join(map(str, words))


def _describe_calibration(calibration: dict[str, Any]) -> str:
    if not calibration.get("source"):
        return "none"
    return "{source}, {samples} windows of {seq_len} tokens, seed {seed}".format(**calibration)


def fold_names(names: Iterable[str]) -> str:
    """Names with the block numbers folded together: model.layers.*.input_layernorm.weight ×30."""
    folded = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(name if n == 1 else f"{name} ×{n}" for name, n in folded.items())


def _tensor_table(rows: list[dict[str, Any]]) -> list[str]:
    width = max((len(row["name"]) for row in rows), default=4)
    lines = [f"{'name':{width}}  {'shape':>16}  {'encoding':8}  {'bits':>4}  {'group':>5}  {'bytes':>12}  error"]
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.2e}"
        cells = f"{row['encoding']:8}  {row['bits']:>4}  {row['group_size'] or '':>5}  {row['bytes']:>12,}  {error}"
        lines.append(f"{row['name']:{width}}  {shape:>16}  {cells}".rstrip())
    return lines


def _tensor_row(entry: TensorEntry) -> dict[str, Any]:
    encoding = entry.encoding
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "encoding": encoding.name,
        "bits": encoding.bits if isinstance(encoding, Uniform) else DENSE_BITS[encoding.dtype],
        "group_size": encoding.group_size if isinstance(encoding, Uniform) else None,
        "bytes": stored_bytes(encoding, entry.shape),
        "relative_error": entry.relative_error,
    }
