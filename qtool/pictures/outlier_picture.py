"""The density of a layer's outliers as an `<svg>`: the matrix, with the counts of its rows and columns at its sides."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from qtool.pictures.axis import Axis, tick_label
from qtool.pictures.heatmap import N_SHADES
from qtool.pictures.markup import Markup, element, number
from qtool.pictures.positions import I64, Density, fullest

_LEFT, _TOP, _GAP, _SIDE = 64.0, 92.0, 8.0, 110.0  # the strips of counts are 84 and 110 pixels deep
_LONG, _SHORT = 620.0, 180.0  # pixels of the matrix's longer side, and at least of the shorter one
_FAINTEST = N_SHADES // 3


def draw_density(found: Density, title: str) -> Markup:
    """Rows down, columns across; at least one outlier. Colours are those of the style of `qtool.pictures.page`."""
    width, height = _extent(found.rows.size, found.columns.size)
    total_width, total_height = _LEFT + width + _GAP + _SIDE + 40, _TOP + height + 50
    most = float(found.bins.max())
    drawn = [
        element("title", title),
        element("rect", class_="back", x=_LEFT, y=_TOP, width=width, height=height),
        _matrix(found.bins, most, width, height),
        *_column_counts(found.columns, width),
        *_row_counts(found.rows, width, height),
        *_words(found, width, height),
    ]
    return element(
        "svg", *drawn, xmlns="http://www.w3.org/2000/svg", width=total_width, height=total_height,
        viewBox=f"0 0 {number(total_width)} {number(total_height)}", role="img", aria_label=title,
    )  # fmt: skip


def describe_density(found: Density) -> str:
    """The pattern in words."""
    total, n_rows, n_columns = int(found.rows.sum()), found.rows.size, found.columns.size
    row, column = int(found.rows.argmax()), int(found.columns.argmax())
    (few_rows, in_rows), (few_columns, in_columns) = fullest(found.rows), fullest(found.columns)
    return (
        f"{total:,} outliers, {total / (n_rows * n_columns):.3%} of {n_rows:,} × {n_columns:,} weights. "
        f"The fullest {few_columns:,} of {n_columns:,} columns hold {in_columns:.1%} of them (spread evenly: "
        f"{few_columns / n_columns:.1%}), the fullest {few_rows:,} of {n_rows:,} rows {in_rows:.1%} (evenly: "
        f"{few_rows / n_rows:.1%}). Column {column:,} has most, {int(found.columns[column]):,}, "
        f"and row {row:,}, {int(found.rows[row]):,}."
    )


def _extent(n_rows: int, n_columns: int) -> tuple[float, float]:
    """Width and height of the matrix in its own proportions, as far as both can be seen."""
    longer = max(n_rows, n_columns)
    return max(_LONG * n_columns / longer, _SHORT), max(_LONG * n_rows / longer, _SHORT)


def _matrix(bins: npt.NDArray[np.float64], most: float, width: float, height: float) -> Markup:
    """One path for each shade, of strokes along the rows: a fraction of what a rectangle for each bin would take."""
    n_down, n_across = bins.shape
    # The root, because most rectangles hold few outliers and a column of them many. What holds any stands out.
    shades = _FAINTEST + np.floor(np.sqrt(bins / most) * (N_SHADES - 1 - _FAINTEST))
    shades[bins == 0] = -1
    paths = [
        element("path", class_=f"line{shade}", d="".join(_runs(shades == shade)))
        for shade in range(_FAINTEST, N_SHADES)
        if (shades == shade).any()
    ]
    place = f"translate({number(_LEFT)} {number(_TOP)}) scale({width / n_across:.5g} {height / n_down:.5g})"
    return element("g", *paths, transform=place, shape_rendering="crispEdges")


def _runs(mask: npt.NDArray[np.bool_]) -> Iterable[str]:
    """The stretches of a mask's rows: where each starts, and how long it is."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    for (row, start), (_, end) in zip(starts.tolist(), ends.tolist(), strict=True):
        yield f"M{start} {row}.5h{end - start}"


def _column_counts(columns: I64, width: float) -> Iterable[Markup]:
    heights, depth = _outline(columns, int(width)), _TOP - _GAP - 18
    base, step = _TOP - _GAP, width / heights.size
    tops = [number(base - depth * h) for h in heights.tolist()]
    steps = "".join(f"V{top}H{number(_LEFT + step * (i + 1))}" for i, top in enumerate(tops))
    yield element("path", class_="count", d=f"M{number(_LEFT)} {number(base)}{steps}V{number(base)}z")
    words = f"outliers in each column, up to {tick_label(float(columns.max()))}"
    yield element("text", words, class_="tick", x=_LEFT, y=12)


def _row_counts(rows: I64, width: float, height: float) -> Iterable[Markup]:
    lengths, left = _outline(rows, int(height)), _LEFT + width + _GAP
    step = height / lengths.size
    ends = [number(left + _SIDE * length) for length in lengths.tolist()]
    steps = "".join(f"H{end}V{number(_TOP + step * (i + 1))}" for i, end in enumerate(ends))
    yield element("path", class_="count", d=f"M{number(left)} {number(_TOP)}{steps}H{number(left)}z")
    words = f"in each row, up to {tick_label(float(rows.max()))}"
    yield element("text", words, class_="tick", x=left, y=_TOP - _GAP)


def _outline(counts: I64, n_pixels: int) -> npt.NDArray[np.float64]:
    """Counts as shares of the greatest, one for each pixel at most: the greatest of those that share a pixel."""
    starts = np.arange(min(n_pixels, counts.size)) * counts.size // min(n_pixels, counts.size)
    return np.maximum.reduceat(counts, starts) / max(int(counts.max()), 1)


def _words(found: Density, width: float, height: float) -> Iterable[Markup]:
    """What the sides are, with the numbers of some columns and rows."""
    bottom, middle = _TOP + height, _TOP + height / 2
    for tick, x in _ticks(found.columns.size, width):
        yield element("text", tick, class_="tick", x=_LEFT + x, y=bottom + 16, text_anchor="middle")
    for tick, y in _ticks(found.rows.size, height):
        yield element("text", tick, class_="tick", x=_LEFT - 8, y=_TOP + y + 4, text_anchor="end")
    yield element("text", "columns (inputs)", class_="axis", x=_LEFT + width / 2, y=bottom + 38, text_anchor="middle")
    turned = f"rotate(-90 14 {number(middle)})"
    yield element("text", "rows (outputs)", class_="axis", x=14, y=middle, text_anchor="middle", transform=turned)


def _ticks(size: int, length: float) -> Iterable[tuple[str, float]]:
    """Round indices of a side and where they lie along it."""
    for tick in Axis.spanning([0, size]).ticks():
        if tick.is_integer():
            yield tick_label(tick), length * tick / size
