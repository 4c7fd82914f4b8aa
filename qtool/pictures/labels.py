"""Where the names of points go so that none lies on another one, on a point or outside the frame."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Place: TypeAlias = tuple[float, float]  # x, y in pixels; y grows downwards
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

LINE_HEIGHT = 14.0
_EM_WIDTH = 6.7  # of an average letter at 12 pixels, a little wide on purpose
_LINE_STEP = 5.0  # pixels
_MARKER = 7.0  # half of what a marker takes
_DISTANCES = (10.0, 24.0, 42.0, 64.0, 90.0)
_LONGEST = 40  # characters
_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1))
_CORNERS = tuple((right, down) for right in (1, -1, 0.5, -0.5) for down in (-1, 1, -0.5, 0.5))
_DIRECTIONS = (*_SIDES, *_CORNERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """A name and where it stands; `leader` is where a line from its point ends, for one that is not beside it."""

    text: str
    box: Box
    leader: Place | None


def place_labels(
    points: Sequence[Place],
    texts: Sequence[str],
    frame: Box,
    *,
    reserved: Sequence[Box] = (),
    lines: Sequence[Box] = (),
) -> list[Label | None]:
    """A place for each text near its point, the nearest that is free; None for one that fits nowhere.

    points: (x, y) in pixels, each inside `frame`; `texts` name them, in the same order. `reserved` stays free, and
    `lines`, boxes along what is drawn, as far as there is room elsewhere.
    """
    taken = [*reserved, *map(marker_box, points)]
    named: list[Box] = []
    labels: list[Label | None] = []
    for point, text in zip(points, texts, strict=True):
        candidates = _candidates(point, text, frame, [*taken, *named], named)
        label = next((c for c in candidates if not _is_on(c.box, lines)), None)
        label = label or next(_candidates(point, text, frame, [*taken, *named], named), None)
        labels.append(label)
        if label is not None:
            named.append(label.box)
            taken += line_boxes([point, label.leader]) if label.leader else []
    return labels


def place_caption(text: str, y: float, frame: Box, taken: Sequence[Box]) -> Box:
    """A place for what is written on a level line: at its right end or its left one, above or below."""
    width, (left, _, right, _) = text_width(text), frame
    places = [
        (x, top, x + width, top + LINE_HEIGHT)
        for x in (right - 4 - width, left + 4)
        for top in (y - 2 - LINE_HEIGHT, y + 2)
    ]
    free = (box for box in places if _is_inside(box, frame) and not _is_on(box, taken))
    return next(free, places[0])


def marker_box(point: Place) -> Box:
    """What the marker of a point takes."""
    return _around(*point, _MARKER, _MARKER)


def line_boxes(corners: Sequence[Place]) -> list[Box]:
    """Small boxes along the line through the corners."""
    boxes = []
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        n = 1 + int(math.dist((x, y), (next_x, next_y)) / _LINE_STEP)
        for part in range(n + 1):
            boxes.append(_around(x + (next_x - x) * part / n, y + (next_y - y) * part / n, 1, 1))
    return boxes


def text_width(text: str) -> float:
    """About what a text of 12 pixels takes; wide characters count twice."""
    return _EM_WIDTH * sum(1 if ord(char) < 0x1100 else 2 for char in text)


def short(text: str, longest: int = _LONGEST) -> str:
    """The text, its middle left out when it is too long to stand in a picture."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _candidates(point: Place, text: str, frame: Box, taken: Sequence[Box], named: Sequence[Box]) -> Iterator[Label]:
    """Places on nothing that is `taken`, the nearest first; no leader crosses a name."""
    half_width, half_height = text_width(text) / 2, LINE_HEIGHT / 2
    for distance in _DISTANCES:
        for right, down in _DIRECTIONS:
            x = point[0] + right * (distance + half_width)
            y = point[1] + down * (distance + half_height)
            box = _around(x, y, half_width, half_height)
            leader = None if distance == _DISTANCES[0] else _nearest(box, point)
            crosses = leader is not None and any(_is_on(part, named) for part in line_boxes([point, leader]))
            if _is_inside(box, frame) and not _is_on(box, taken) and not crosses:
                yield Label(text=text, box=box, leader=leader)


def _nearest(box: Box, point: Place) -> Place:
    """Where in the box it is nearest to the point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _is_on(box: Box, others: Iterable[Box]) -> bool:
    return any(overlap(box, other) for other in others)


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _is_inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have any room in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
