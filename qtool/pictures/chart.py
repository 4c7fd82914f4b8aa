"""Quality against size as a picture: points, their names and the frontier, as one `<svg>`. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qtool.pictures.axis import Axis, tick_label
from qtool.pictures.labels import (
    Box,
    Label,
    Place,
    line_boxes,
    marker_box,
    place_caption,
    place_labels,
    short,
    text_width,
)
from qtool.pictures.markup import Markup, element, join, number

WIDTH, HEIGHT = 960, 520
_FRAME: Box = (76.0, 16.0, WIDTH - 20.0, HEIGHT - 58.0)
_LEGEND_HEIGHT = 24.0
N_SERIES = 6  # colours and shapes that are told apart; a seventh series looks as the first
_LOG_FROM = 4.0  # greatest over least value, from which a logarithmic axis shows more


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model: what it takes (`x`) and how bad it is (`y`, lower is better), both finite."""

    series: str
    label: str
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What to draw; `references` are named heights, such as the uncompressed model's."""

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]
    references: Sequence[tuple[str, float]] = ()


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats, by size: nothing as small is as good."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


def draw_chart(chart: Chart) -> Markup:
    """The chart as an `<svg>` that takes its colours from the style of `qtool.pictures.page`; at least one point."""
    heights = [*(point.y for point in chart.points), *(height for _, height in chart.references)]
    x_axis = Axis.around(point.x for point in chart.points)
    y_axis = Axis.around(heights, log=min(heights) > 0 and max(heights) >= _LOG_FROM * min(heights))
    places = [_place(point, x_axis, y_axis) for point in chart.points]
    joined = [_place(point, x_axis, y_axis) for point in frontier(chart.points)]
    references, reserved = _references(chart, y_axis, places)
    names = [short(point.label) for point in chart.points]
    labels = place_labels(places, names, _FRAME, reserved=reserved, lines=_lines(chart, y_axis, joined))
    series = list(dict.fromkeys(point.series for point in chart.points))
    height = HEIGHT + (_LEGEND_HEIGHT if len(series) > 1 else 0)
    return element(
        "svg",
        element("title", chart.title),
        *_grid(chart, x_axis, y_axis),
        *references,
        _frontier_line(joined),
        *(_marker(point, place, series) for point, place in zip(chart.points, places, strict=True)),
        *(_name(place, label) for place, label in zip(places, labels, strict=True) if label is not None),
        *(_legend(series) if len(series) > 1 else ()),
        *_left_out(labels.count(None)),
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {number(height)}",
        width=WIDTH, height=height, role="img", aria_label=chart.title,
    )  # fmt: skip


def _place(point: Point, x_axis: Axis, y_axis: Axis) -> Place:
    return _x(x_axis.share(point.x)), _y(y_axis.share(point.y))


def _x(share: float) -> float:
    return _FRAME[0] + share * (_FRAME[2] - _FRAME[0])


def _y(share: float) -> float:
    return _FRAME[3] - share * (_FRAME[3] - _FRAME[1])


def _grid(chart: Chart, x_axis: Axis, y_axis: Axis) -> Iterable[Markup]:
    left, top, right, bottom = _FRAME
    for tick in x_axis.ticks():
        x = _x(x_axis.share(tick))
        yield element("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom)
        yield element("text", tick_label(tick), class_="tick", x=x, y=bottom + 18, text_anchor="middle")
    for tick in y_axis.ticks():
        y = _y(y_axis.share(tick))
        yield element("line", class_="grid", x1=left, x2=right, y1=y, y2=y)
        yield element("text", tick_label(tick), class_="tick", x=left - 8, y=y + 4, text_anchor="end")
    yield element("path", class_="frame", d=f"M{number(left)} {number(top)}V{number(bottom)}H{number(right)}")
    yield element("text", chart.x_label, class_="axis", x=(left + right) / 2, y=bottom + 44, text_anchor="middle")
    words = f"{chart.y_label}, logarithmic" if y_axis.log else chart.y_label
    middle = (top + bottom) / 2
    turned = f"rotate(-90 18 {number(middle)})"
    yield element("text", words, class_="axis", x=18, y=middle, text_anchor="middle", transform=turned)


def _references(chart: Chart, y_axis: Axis, places: Sequence[Place]) -> tuple[list[Markup], list[Box]]:
    """The lines of the references with their names, and the room that the names take."""
    drawn: list[Markup] = []
    boxes = [marker_box(place) for place in places]
    for name, height in chart.references:
        words, y = f"{short(name)}: {height:.4g}", _y(y_axis.share(height))
        box = place_caption(words, y, _FRAME, boxes)
        boxes.append(box)
        drawn.append(element("line", class_="reference", x1=_FRAME[0], x2=_FRAME[2], y1=y, y2=y))
        drawn.append(element("text", words, class_="tick", x=box[0], y=box[3] - 3))
    return drawn, boxes[len(places) :]


def _lines(chart: Chart, y_axis: Axis, joined: Sequence[Place]) -> list[Box]:
    """Room along what is drawn as a line, which names had better leave alone."""
    levels = [_y(y_axis.share(height)) for _, height in chart.references]
    return line_boxes(joined) + [(_FRAME[0], y - 1, _FRAME[2], y + 1) for y in levels]


def _frontier_line(places: Sequence[Place]) -> Markup:
    return element("path", class_="frontier", d="M" + "L".join(f"{number(x)} {number(y)}" for x, y in places))


def _marker(point: Point, place: Place, series: Sequence[str]) -> Markup:
    kind = series.index(point.series) % N_SERIES
    title = element("title", f"{point.label} ({point.series}): {point.x:.4g}, {point.y:.4g}")
    return element("g", title, element("path", class_=f"series{kind}", d=_shape(kind, *place)))


def _shape(kind: int, x: float, y: float) -> str:
    """Told apart without colour: disc, square, triangle, diamond, triangle on its tip, cross."""
    outlines = (
        "m-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0z",
        "m-5.5 -5.5h11v11h-11z",
        "m0 -7l7 12h-14z",
        "m0 -7l7 7l-7 7l-7 -7z",
        "m0 7l7 -12h-14z",
        "m-2 -6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    )
    return f"M{number(x)} {number(y)}{outlines[kind]}"


def _name(place: Place, label: Label) -> Markup:
    left, _, right, bottom = label.box
    text = element("text", label.text, class_="name", x=(left + right) / 2, y=bottom - 3, text_anchor="middle")
    if label.leader is None:
        return text
    x, y = label.leader
    return join(element("line", class_="leader", x1=place[0], y1=place[1], x2=x, y2=y), text)


def _left_out(n: int) -> Iterable[Markup]:
    if n:
        words = f"no room for {n} of the names"
        yield element("text", words, class_="tick", x=_FRAME[2], y=_FRAME[3] + 44, text_anchor="end")


def _legend(series: Sequence[str]) -> Iterable[Markup]:
    x = _FRAME[0] + 8
    for index, name in enumerate(series):
        kind = index % N_SERIES
        yield element("path", class_=f"series{kind}", d=_shape(kind, x, HEIGHT + 4.0))
        yield element("text", short(name, 24), class_="tick", x=x + 12, y=HEIGHT + 8.0)
        x += 36 + text_width(short(name, 24))
