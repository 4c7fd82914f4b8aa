"""`qtool inspect FILE --report`: a file's bits, errors, outliers and sizes as one page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from formats.header import TensorEntry
from formats.reader import QtmFile
from qtool.errors import ConfigError
from qtool.pictures.breakdown import PARTS, size_by_part
from qtool.pictures.depth import by_depth, draw_bits, draw_errors, tabulate
from qtool.pictures.markup import Markup, element, join
from qtool.pictures.outlier_picture import describe_density, draw_density
from qtool.pictures.page import facts, figure, html_page, swatch, table
from qtool.pictures.positions import count_outliers, density, outlier_positions
from qtool.pictures.style import N_PARTS
from qtool.publish import check_page, write_page
from qtool.report import inspect_open, summarize
from qtool.sizes import format_bytes

_BAR_WIDTH, _BAR_HEIGHT = 960.0, 34.0
_LONGEST_VALUE = 300  # characters of a value in a free object


def write_report(path: Path, output: Path | None, layer: str | None, *, overwrite: bool = False) -> str:
    """Write the page of the file at `path` and return its name; `layer` is the one whose outliers are shown.

    ConfigError when the page cannot be written under its name or there is no such layer; FormatError for the file.
    """
    if output is None:
        raise ConfigError(f"--layer {layer}: chooses what --report shows; give --report OUT.html too")
    check_page(output, "--report", (".html", ".htm"), overwrite=overwrite)
    with QtmFile.open(path) as file:
        page = draw_file(file, path.name, layer)
    write_page(output, page)
    return str(output)


def draw_file(file: QtmFile, name: str, layer: str | None = None) -> str:
    """The page of a file that is open; `name` is its title."""
    found = inspect_open(file)
    body = [
        element("h1", name),
        facts(summarize(found)),
        *_section("Quality as recorded in the file", _quality(found)),
        *_section("Bits and error by depth", _depth(file)),
        *_section("Size by part", _sizes(size_by_part(file))),
        *_section("Outliers", _outliers(file, layer)),
        *_section("How it was made", [facts(_free("recipe", found["recipe"]) + _free("", found["provenance"]))]),
        *_section("Every tensor", [_tensors(found["tensors"])]),
    ]
    return html_page(f"{name} – qtool", body)


def _section(title: str, content: Iterable[Markup]) -> list[Markup]:
    return [element("h2", title), *content]


def _text(*sentences: str) -> Markup:
    return element("p", " ".join(sentences))


def _quality(found: Mapping[str, Any]) -> list[Markup]:
    """The warnings stand in the summary; here is every figure, whatever its name."""
    figures = {key: value for key, value in found["quality"].items() if value not in ({}, [], None)}
    if not figures:
        return [_text("Nothing was recorded.")]
    note = "" if "perplexity" in figures else "No perplexity is in the file; qtool eval perplexity measures it."
    return [facts(_free("", figures)), *([_text(note)] if note else [])]


def _free(name: str, value: Any) -> list[tuple[str, str]]:
    """What a free object of the header holds, a line for each of its members and theirs."""
    if isinstance(value, dict) and (value or not name):
        named = ((f"{name} {key}".strip().replace("_", " "), member) for key, member in value.items())
        return [row for key, member in named for row in _free(key, member)]
    return [(_cut(name), _cut(value if isinstance(value, str) else _number_or_json(value)))]


def _number_or_json(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _depth(file: QtmFile) -> list[Markup]:
    depth = by_depth(file.header)
    if not depth.cells:
        return [_text("The file names no blocks with linear layers in them.")]
    errors = draw_errors(depth)
    return [
        _text("Everything stored for a layer is counted: codes, scales, zeros, outliers and padding."),
        figure(draw_bits(depth)),
        _text(
            "The error is the share of the layer's output energy that was lost on the calibration data;",
            "where there was none, of the energy of its weights.",
        ),
        _text("No error was recorded.") if errors is None else figure(errors),
        tabulate(depth),
    ]


def _sizes(sizes: Mapping[str, int]) -> list[Markup]:
    total = sum(sizes.values())
    rows = [
        [join(swatch(_colour(name)), name), f"{n:,}", format_bytes(n), f"{n / total:.2%}"] for name, n in sizes.items()
    ]
    rows.append(["the file", f"{total:,}", format_bytes(total), "100%"])
    return [figure(_bar(sizes, total)), table(["part", "bytes", "", "share"], rows, numeric=(1, 2, 3))]


def _bar(sizes: Mapping[str, int], total: int) -> Markup:
    segments, left = [element("title", "Size of the file by part")], 0.0
    for name, n in sizes.items():
        width = _BAR_WIDTH * n / total
        gap = min(1.5, width / 4)  # between neighbours, so that no two colours have to be told apart
        title = element("title", f"{name}: {n:,} bytes, {n / total:.2%}")
        kind = f"part{_colour(name)}"
        segments.append(element("rect", title, class_=kind, x=left, width=width - gap, height=_BAR_HEIGHT))
        left += width
    return element(
        "svg", *segments, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_BAR_WIDTH:g} {_BAR_HEIGHT:g}",
        width=_BAR_WIDTH, height=_BAR_HEIGHT, role="img", aria_label="Size of the file by part",
    )  # fmt: skip


def _colour(part: str) -> int:
    """The same in every page."""
    return (PARTS.index(part) if part in PARTS else len(PARTS)) % N_PARTS


def _outliers(file: QtmFile, layer: str | None) -> list[Markup]:
    entry = _chosen(file, layer)
    if entry is None:
        return [_text("No layer of this file holds outliers: every weight is in the codes or was left dense.")]
    if not count_outliers(entry):
        return [_text(f"{entry.name} holds no outliers.")]
    found = density(outlier_positions(file, entry))
    chosen = "the layer that was asked for" if layer else "the layer that holds most of them; --layer chooses another"
    return [
        element("h3", entry.name),
        _text(f"{chosen[0].upper()}{chosen[1:]}. {describe_density(found)}"),
        figure(draw_density(found, f"Density of the outliers of {entry.name}")),
    ]


def _chosen(file: QtmFile, layer: str | None) -> TensorEntry | None:
    """The layer that was asked for, or else the one with most outliers; None when there are none at all."""
    if layer is None:
        most = max(file.tensors.values(), key=count_outliers, default=None)
        return most if most is not None and count_outliers(most) else None
    if layer not in file.tensors:
        raise ConfigError(f"--layer {layer}: no such tensor in {file.label}; qtool inspect FILE --tensors lists them")
    return file.tensors[layer]


def _tensors(rows: Iterable[Mapping[str, Any]]) -> Markup:
    head = ["name", "shape", "encoding", "bits", "group", "bytes", "relative error"]
    cells = [
        [
            row["name"],
            "×".join(map(str, row["shape"])),
            row["encoding"],
            str(row["bits"]),
            str(row["group_size"] or ""),
            f"{row['bytes']:,}",
            "" if row["relative_error"] is None else f"{row['relative_error']:.2e}",
        ]
        for row in rows
    ]
    listed = table(head, cells, numeric=(3, 4, 5, 6))
    return element("details", element("summary", f"{len(cells):,} tensors, as they are stored"), listed)
