"""The chart: every point at its place, every name readable, the frontier right."""

import itertools
import random
import re

from hypothesis import given
from hypothesis import strategies as st
from page_tools import of_class, parse, svgs, words

from qtool.pictures.chart import Chart, Point, draw_chart, frontier
from qtool.pictures.labels import line_boxes, marker_box, overlap, place_caption, place_labels, short, text_width
from qtool.pictures.page import standalone_svg

FRAME = (0.0, 0.0, 800.0, 400.0)


def point(x, y, label="p", series="s"):
    return Point(series=series, label=label, x=x, y=y)


def draw(*points, references=()):
    chart = Chart(title="T", x_label="bits", y_label="perplexity", points=points, references=references)
    return svgs(parse(standalone_svg(draw_chart(chart))))["T"]


def starts(svg, name):
    """Where the paths of a class start: (x, y)."""
    return [tuple(map(float, re.findall(r"[\d.]+", node.get("d"))[:2])) for node in of_class(svg, name)]


def texts(svg):
    return [words(node) for node in svg.iter() if node.tag.endswith("}text")]


# ---- the frontier


def test_frontier_by_hand():
    a, b, c, d = point(2, 9, "a"), point(3, 5, "b"), point(4, 6, "c"), point(5, 4, "d")
    assert frontier([d, c, b, a]) == [a, b, d]
    assert frontier([point(3, 5), point(3, 4), point(3, 5)]) == [point(3, 4)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_frontier_is_what_nothing_beats(places):
    points = [point(x, y) for x, y in places]
    beaten = [p for p in points if any(q.x <= p.x and q.y <= p.y and q != p for q in points)]
    assert set(frontier(points)) == set(points) - set(beaten)


# ---- the picture


def test_points_lie_as_their_numbers_do():
    svg = draw(point(2, 30, "a"), point(3, 25, "b", "other"), point(4, 20, "c"))
    (ax, ay), (bx, by), (cx, cy) = sorted(starts(svg, "series")[:3])
    assert bx - ax == cx - bx > 100
    assert by - ay == cy - by > 50  # down the page: a lower figure lies lower
    assert {"a", "b", "c", "bits", "perplexity"} <= set(texts(svg))
    titles = {words(node) for node in svg.iter() if node.tag.endswith("}title")}
    assert {"T", "a (s): 2, 30", "b (other): 3, 25"} <= titles


def test_the_frontier_is_drawn_through_its_points():
    svg = draw(point(2, 30), point(3, 40), point(4, 20))
    (line,) = of_class(svg, "frontier")
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)", line.get("d"))
    assert [tuple(map(float, corner)) for corner in corners] == [starts(svg, "series")[i] for i in (0, 2)]


def test_series_are_told_apart_by_shape_as_well_as_colour():
    points = [point(i, i + 1, str(i), f"series {i}") for i in range(6)]
    paths = of_class(draw(*points), "series")
    assert len({path.get("class") for path in paths}) == 6
    assert len({re.sub(r"^M[\d.]+ [\d.]+", "", path.get("d")) for path in paths}) == 6
    assert len(paths) == 12  # the legend's too
    assert len(of_class(draw(point(1, 2), point(2, 1)), "series")) == 2  # one series needs none


def test_the_axis_is_logarithmic_where_it_helps():
    assert "perplexity, logarithmic" in texts(draw(point(2, 400), point(4, 25)))
    assert "perplexity" in texts(draw(point(2, 40), point(4, 25)))
    assert "perplexity" in texts(draw(point(2, 400), point(4, 0)))  # zero has no logarithm


def test_a_reference_is_a_named_line():
    svg = draw(point(2, 40), point(4, 25), references=[("uncompressed", 22.887)])
    (line,) = of_class(svg, "reference")
    assert line.get("y1") == line.get("y2")
    assert float(line.get("y1")) > max(y for _, y in starts(svg, "series"))
    assert "uncompressed: 22.89" in texts(svg)


def test_a_single_point_has_a_chart_too():
    assert len(of_class(draw(point(4, 25)), "series")) == 1


def test_names_without_room_are_counted():
    svg = draw(*(point(4, 25, f"a name of some length {i}") for i in range(60)))
    shown = [text for text in texts(svg) if text.startswith("a name")]
    assert 0 < len(shown) < 60
    assert f"no room for {60 - len(shown)} of the names" in texts(svg)


def test_hostile_labels_stay_text():
    label = "</text><script>alert(1)</script>"
    svg = draw(point(2, 3, label, label), point(4, 2, "x", "y"), references=[(label, 2.0)])
    assert short(label) in texts(svg)


# ---- the names


def test_names_do_not_touch():
    rng = random.Random(0)
    points = [(rng.uniform(20, 780), rng.uniform(20, 380)) for _ in range(40)]
    labels = place_labels(points, [f"model {i}" for i in range(40)], FRAME)
    boxes = [label.box for label in labels if label is not None]
    assert len(boxes) >= 35
    assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    assert not any(overlap(box, marker_box(place)) for box in boxes for place in points)
    for place, label in zip(points, labels, strict=True):
        if label is not None and label.leader is not None:
            crossed = [box for part in line_boxes([place, label.leader]) for box in boxes if overlap(part, box)]
            assert set(crossed) <= {label.box}


def test_a_name_stands_beside_its_point_and_off_the_line():
    free, moved = (place_labels([(400, 200)], ["name"], FRAME, lines=lines)[0] for lines in ([], LEVEL))
    assert (free.leader, free.box[0]) == (None, 410)
    assert not any(overlap(moved.box, part) for part in LEVEL)
    crowded = line_boxes([(x, y) for y in range(0, 400, 6) for x in (0, 800)])
    assert place_labels([(400, 200)], ["name"], FRAME, lines=crowded)[0] == free  # rather on a line than nowhere


LEVEL = line_boxes([(0, 200), (800, 200)])


def test_a_caption_leaves_markers_alone():
    at_the_right_end = marker_box((780, 190))
    assert place_caption("uncompressed", 200, FRAME, [])[2] == 796
    assert place_caption("uncompressed", 200, FRAME, [at_the_right_end])[1] == 202  # below the line
    wall = (700.0, 0.0, 800.0, 400.0)
    assert place_caption("uncompressed", 200, FRAME, [wall])[0] == 4


def test_short():
    assert short("a" * 40) == "a" * 40
    assert short("a" * 20 + "b" * 21) == "a" * 19 + "…" + "b" * 19
    assert text_width("漢字") == text_width("abcd")
