"""The `README.md` of an exported folder: what it holds, how it was made, what was measured, how to load it.

Everything in it comes from the file's header, which may be a stranger's: names are escaped, and what is not as qtool
writes it is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.block_lists import list_names
from formats.encoding import align
from formats.export.command import compress_command
from formats.export.report import Loss
from formats.header import SECTION_ALIGNMENT, Header
from formats.reader import QtmFile

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LONGEST_VALUE, _MOST_ROWS = 200, 64
_SNIPPET = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({title})
tokenizer = AutoTokenizer.from_pretrained({title})
ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=32)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a folder is loaded: what transformers needs besides itself, and whether vLLM serves it."""

    format: str
    packages: tuple[str, ...] = ()
    imports: str = ""  # a module that has to be imported before
    has_vllm: bool = False
    options: tuple[str, ...] = ()  # of the export, besides its format


def model_card(file: QtmFile, *, title: str, loading: Loading, weights_bytes: int, losses: Sequence[Loss] = ()) -> str:
    """Markdown with the front matter of the hub. title: the folder's name; weights_bytes: of all its weight files;
    losses: what the format could not carry.
    """
    header = file.header
    base = _base_model(header)
    parts = [
        _front_matter(header, base, loading.format),
        f"# {_text(title)}",
        _introduction(header, base, loading.format),
        "## How to load it",
        _how_to_load(header, title, loading),
        "## Size",
        _table([*_sizes(file), ("weights of this folder", f"{weights_bytes:,} bytes")]),
        "## Recipe",
        _table([*_flat("", header.recipe)]),
        "## Quality, as the file records it",
        _table([*_quality(header)]) + _WHAT_ERRORS_ARE + _describe_losses(losses),
        "## How it was made",
        _how_it_was_made(header, base, loading, is_lossy=bool(losses)),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


_WHAT_ERRORS_ARE = """

An error is the share of a layer's output energy that was lost on the calibration text; where there was none, of the
energy of its weights. It compares layers and recipes of one model and is no perplexity: `qtool eval` measures that."""


def _describe_losses(losses: Sequence[Loss]) -> str:
    if not losses:
        return ""
    worst = max(losses, key=lambda loss: loss.error)
    return (
        f"\n\n**{len(losses)} tensors were rounded again** for this format (`--lossy`), which is not in these figures: "
        f"{_text(worst.name)} lost most, {100 * worst.error:.3g}% of the energy of its weights."
    )


def _base_model(header: Header) -> str | None:
    """The hub id that the model was compressed from, if it was; never a path."""
    named = header.provenance.get("base_model")
    return named if isinstance(named, str) and _HUB_ID.fullmatch(named) else None


def _is_encoder_decoder(header: Header) -> bool:
    config = header.model.get("config")
    return isinstance(config, dict) and config.get("is_encoder_decoder") is True


def _front_matter(header: Header, base: str | None, to: str) -> str:
    lines = [] if base is None else [f"base_model: {base}", "base_model_relation: quantized"]
    task = "text2text-generation" if _is_encoder_decoder(header) else "text-generation"
    lines += ["library_name: transformers", f"pipeline_tag: {task}", "tags:", "- qtool", f"- {to}"]
    return "\n".join(["---", *lines, "---"])


def _introduction(header: Header, base: str | None, to: str) -> str:
    version = header.provenance.get("qtool")
    of = f"[{base}](https://huggingface.co/{base})" if base else "A model"
    by = f"qtool {_text(version)}" if isinstance(version, str) else "qtool"
    done = "quantized elsewhere, taken over" if "imported" in header.recipe else "compressed"
    return f"{of}, {done} by {by} and exported in the format `{to}`."


def _how_to_load(header: Header, title: str, loading: Loading) -> str:
    auto = "AutoModelForSeq2SeqLM" if _is_encoder_decoder(header) else "AutoModelForCausalLM"
    code = _SNIPPET.format(auto=auto, title=json.dumps(title))
    if loading.imports:
        code = f"import {loading.imports}\n{code}"
    parts = [f"    pip install {' '.join(['torch', 'transformers', *loading.packages])}", f"```python\n{code}```"]
    if loading.has_vllm:
        parts.append(f"    vllm serve {re.sub(r'[^A-Za-z0-9_./-]', '?', title)}")
    return "\n\n".join(parts)


def _sizes(file: QtmFile) -> list[tuple[str, str]]:
    prefixes = tuple(f"{name}." for name in list_names(file.header.model))
    linears = [e for e in file.header.tensors if len(e.shape) == 2 and e.name.startswith(prefixes)]
    weights = sum(e.shape[0] * e.shape[1] for e in linears)
    stored = sum(align(e.n_bytes, SECTION_ALIGNMENT) for e in linears)
    rows = [("file that it was exported from", f"{file.n_bytes:,} bytes")]
    return (
        [*rows, ("bits per weight in it", f"{8 * stored / weights:.3f} (linears of the blocks)")] if weights else rows
    )


def _quality(header: Header) -> Iterator[tuple[str, str]]:
    """Figures as they are; of members that list layers, how many."""
    for name, value in header.quality.items():
        if isinstance(value, dict | list):
            if value:
                yield _words(name), f"{len(value)}, which `qtool inspect` names"
        elif value is not None:
            yield _words(name), _value(value)
    errors = {e.name: e.relative_error for e in header.tensors if e.relative_error is not None}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        yield "largest relative error", f"{errors[worst]:.4g}, of {_text(worst)}"


def _how_it_was_made(header: Header, base: str | None, loading: Loading, *, is_lossy: bool) -> str:
    command = compress_command(header.recipe, base or "MODEL")
    if "imported" in header.recipe:
        command = "qtool import " + ("FILE.gguf" if header.recipe["imported"] == "gguf" else "DIR")
    lines = [] if command is None else [f"    {command} -o model.qtm"]
    options = " ".join([loading.format, *loading.options, *(["--lossy"] if is_lossy else [])])
    lines.append(f"    qtool export model.qtm --to {options} -o FOLDER")
    versions = [f"{name} {_text(v)}" for name, v in header.provenance.items() if name in _TOOLS and isinstance(v, str)]
    return "\n".join(lines) + (f"\n\nWith {', '.join(versions)}." if versions else "")


_TOOLS = ("qtool", "torch", "transformers")


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The members of a free object, and theirs, each with its value."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _flat(f"{name} {key}".strip(), member)
    elif value not in (None, []):
        yield _words(name), _value(value)


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows[:_MOST_ROWS]]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else "Nothing was recorded."


def _words(name: str) -> str:
    return _text(name.replace("_", " "))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _text(text: str) -> str:
    """As Markdown that shows `text` and does nothing else, on one line."""
    cut = text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
    shown = "".join(char if char.isprintable() else "?" for char in cut)
    return re.sub(r"([\\`*_\[\]<>|&#~$!])", r"\\\1", shown)
