"""Bits and errors of the blocks' linears by kind and depth, as two heat maps and a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from formats.block_lists import BlockLists
from formats.header import Header, TensorEntry
from qtool.pictures.axis import Axis
from qtool.pictures.heatmap import HeatMap, draw_heat_map
from qtool.pictures.markup import Markup
from qtool.pictures.page import table
from qtool.report import NUMBER, block_linears
from qtool.sizes import bits_per_weight

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """The blocks' linears: kinds (q_proj to down_proj) in the order of the file, blocks rising, and who is where.

    Several linears are in one cell where a block has many of a kind, as experts are.
    """

    kinds: Sequence[str]
    blocks: Sequence[str]
    cells: Mapping[Cell, Sequence[TensorEntry]]


def by_depth(header: Header) -> Depth:
    """Sort the blocks' linears by their names."""
    found: dict[tuple[str, int], list[TensorEntry]] = {}
    lists = BlockLists.of(header.model, (entry.name for entry in header.tensors))
    for entry in sorted(block_linears(header), key=lambda entry: entry.offset_bytes):
        block = lists.number(entry.name)
        if block is not None:
            kind = NUMBER.sub("*", lists.inside(entry.name).removesuffix(".weight"))
            found.setdefault((kind, block), []).append(entry)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    blocks = sorted({block for _, block in found})
    rows, columns = (
        {kind: row for row, kind in enumerate(kinds)},
        {block: column for column, block in enumerate(blocks)},
    )
    cells = {(rows[kind], columns[block]): entries for (kind, block), entries in found.items()}
    return Depth(kinds=kinds, blocks=list(map(str, blocks)), cells=cells)


def draw_bits(depth: Depth) -> Markup:
    """Bits per weight, on a scale of whole bits: a uniform recipe is to look uniform."""
    values = {place: _bits(entries) for place, entries in depth.cells.items()}
    low = math.floor(min(values.values()))
    axis = Axis(low=low, high=max(math.ceil(max(values.values())), low + 1))
    return _draw(depth, values, axis, "Bits per weight by kind of layer and depth", "bits per weight", "{:.3f} bits")


def draw_errors(depth: Depth) -> Markup | None:
    """Relative errors on a logarithmic scale; None when none was recorded."""
    means = {place: mean_error(entries) for place, entries in depth.cells.items()}
    values = {place: value for place, value in means.items() if value is not None}
    if not values:
        return None
    positive = [value for value in values.values() if value > 0]
    # Over a factor of ten at least: errors that are nearly equal are to look so.
    axis = Axis.spanning(positive, log=True, least=1.0) if positive else Axis.spanning([0.0])
    title = "Relative error by kind of layer and depth"
    return _draw(depth, values, axis, title, "relative error, logarithmic", "error {:.2e}")


def tabulate(depth: Depth) -> Markup:
    """The same in numbers, by kind."""
    rows = []
    for row, kind in enumerate(depth.kinds):
        cells = {depth.blocks[column]: entries for (r, column), entries in depth.cells.items() if r == row}
        entries = [entry for group in cells.values() for entry in group]
        errors = {block: error for block, group in cells.items() if (error := mean_error(group)) is not None}
        worst = max(errors, key=lambda block: errors[block], default=None)
        rows.append(
            [
                kind,
                f"{len(entries):,}",
                f"{_bits(entries):.3f}",
                _or_dash(mean_error(entries)),
                "–" if worst is None else f"{errors[worst]:.2e} in block {worst}",
            ]
        )
    head = ["kind", "layers", "bits per weight", "mean relative error", "worst"]
    return table(head, rows, numeric=(1, 2, 3, 4))


def mean_error(entries: Sequence[TensorEntry]) -> float | None:
    """The mean of the errors that were recorded; None without any."""
    errors = [entry.relative_error for entry in entries if entry.relative_error is not None]
    return sum(error / len(errors) for error in errors) if errors else None


def _draw(depth: Depth, values: Mapping[Cell, float], axis: Axis, title: str, unit: str, words: str) -> Markup:
    cells = {place: (value, f"{_name(depth.cells[place])}: {words.format(value)}") for place, value in values.items()}
    return draw_heat_map(
        HeatMap(title=title, unit=unit, rows=depth.kinds, columns=depth.blocks, cells=cells, axis=axis)
    )


def _name(entries: Sequence[TensorEntry]) -> str:
    return entries[0].name if len(entries) == 1 else f"{entries[0].name} and {len(entries) - 1} like it"


def _bits(entries: Sequence[TensorEntry]) -> float:
    return bits_per_weight((entry.encoding, entry.shape) for entry in entries)


def _or_dash(error: float | None) -> str:
    return "–" if error is None else f"{error:.2e}"
