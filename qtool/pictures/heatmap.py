"""A table of numbers as coloured cells, with the scale beneath, as one `<svg>`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qtool.pictures.axis import Axis, tick_label
from qtool.pictures.labels import short, text_width
from qtool.pictures.markup import Markup, element, number

N_SHADES = 20
_WIDTH, _ROW_HEIGHT, _WIDEST_CELL = 960.0, 24.0, 30.0
_SCALE_WIDTH, _SCALE_HEIGHT = 320.0, 12.0
_COLUMN_NAME = 8  # characters, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """What to draw; `cells` holds, by (row, column), the value and its words. A cell without a value is left out."""

    title: str
    unit: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], tuple[float, str]]
    axis: Axis


def shade(axis: Axis, value: float) -> int:
    """The class of a value's colour, 0 to N_SHADES - 1, from the low end of the axis to the high one."""
    return min(int(axis.share(value) * N_SHADES), N_SHADES - 1)


def draw_heat_map(chart: HeatMap) -> Markup:
    """The heat map as an `<svg>` that takes its colours from the style of `qtool.pictures.page`."""
    rows, columns = [short(name) for name in chart.rows], [short(name, _COLUMN_NAME) for name in chart.columns]
    left = 14 + max(map(text_width, [*rows, "block"]))
    width = min((_WIDTH - left) / max(len(chart.columns), 1), _WIDEST_CELL)
    bottom = _ROW_HEIGHT * len(chart.rows)
    height = bottom + 84
    drawn = [
        element("title", chart.title),
        *(_row_label(name, left, row) for row, name in enumerate(rows)),
        *(_cell(chart, place, left, width) for place in sorted(chart.cells)),
        *_column_labels(columns, left, width, bottom),
        *_scale(chart, left, bottom + 46),
    ]
    return element(
        "svg", *drawn, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {number(_WIDTH)} {number(height)}",
        width=_WIDTH, height=height, role="img", aria_label=chart.title,
    )  # fmt: skip


def _row_label(name: str, left: float, row: int) -> Markup:
    return element("text", name, class_="name", x=left - 8, y=_ROW_HEIGHT * (row + 0.5) + 4, text_anchor="end")


def _cell(chart: HeatMap, place: tuple[int, int], left: float, width: float) -> Markup:
    row, column = place
    value, words = chart.cells[place]
    gap = min(1.0, width / 8)
    return element(
        "rect", element("title", words), class_=f"shade{shade(chart.axis, value)}", x=left + width * column,
        y=_ROW_HEIGHT * row, width=width - gap, height=_ROW_HEIGHT - 1,
    )  # fmt: skip


def _column_labels(columns: Sequence[str], left: float, width: float, bottom: float) -> Iterable[Markup]:
    """Every n-th column has its name, so that they do not touch."""
    widest = max(map(text_width, columns), default=0.0) + 6
    stride = next(n for power in range(6) for n in (10**power, 2 * 10**power, 5 * 10**power) if n * width >= widest)
    for index in range(0, len(columns), stride):
        x = left + width * (index + 0.5)
        yield element("text", columns[index], class_="tick", x=x, y=bottom + 15, text_anchor="middle")
    yield element("text", "block", class_="tick", x=left - 8, y=bottom + 15, text_anchor="end")


def _scale(chart: HeatMap, left: float, top: float) -> Iterable[Markup]:
    step = _SCALE_WIDTH / N_SHADES
    for index in range(N_SHADES):
        x = left + step * index
        yield element("rect", class_=f"shade{index}", x=x, y=top, width=step + 0.3, height=_SCALE_HEIGHT)
    free_from = 0.0
    for tick in chart.axis.ticks():
        x, half_width = left + _SCALE_WIDTH * chart.axis.share(tick), text_width(tick_label(tick)) / 2
        if x - half_width < free_from:
            continue  # its number would lie on the one before
        free_from = x + half_width + 6
        yield element("line", class_="frame", x1=x, x2=x, y1=top + _SCALE_HEIGHT, y2=top + _SCALE_HEIGHT + 4)
        yield element("text", tick_label(tick), class_="tick", x=x, y=top + _SCALE_HEIGHT + 18, text_anchor="middle")
    yield element("text", chart.unit, class_="axis", x=left + _SCALE_WIDTH + 34, y=top + _SCALE_HEIGHT - 1)
