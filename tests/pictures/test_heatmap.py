"""Heat maps: every cell where and as it should be; and the colours themselves."""

import itertools
import re

import pytest
from page_tools import of_class, parse, svgs, words

from qtool.pictures.axis import Axis
from qtool.pictures.heatmap import N_SHADES, HeatMap, draw_heat_map, shade
from qtool.pictures.page import html_page, standalone_svg
from qtool.pictures.style import svg_style


def draw(rows=("q", "k"), columns=("0", "1", "2"), cells=None, axis=None):
    cells = cells if cells is not None else {(0, 0): (2.0, "two"), (1, 2): (4.0, "four")}
    chart = HeatMap(title="T", unit="bits", rows=rows, columns=columns, cells=cells, axis=axis or Axis(low=2, high=4))
    return svgs(parse(standalone_svg(draw_heat_map(chart))))["T"]


def drawn_cells(svg):
    """The cells by their words: (shade, x, y)."""
    found = {}
    for node in of_class(svg, "shade"):
        if len(node):
            place = float(node.get("x")), float(node.get("y"))
            found[words(node)] = (int(node.get("class").removeprefix("shade")), *place)
    return found


def test_cells_lie_in_their_row_and_column():
    found = drawn_cells(draw())
    (low, x, y), (high, other_x, other_y) = found["two"], found["four"]
    assert (low, high) == (0, N_SHADES - 1)
    assert (other_x - x, other_y - y) == (60, 24)
    assert len(found) == 2  # what has no value is left out


def test_the_scale_shows_every_shade_and_its_numbers():
    svg = draw(cells={})
    assert [node.get("class") for node in of_class(svg, "shade")] == [f"shade{i}" for i in range(N_SHADES)]
    shown = [words(node) for node in svg.iter() if node.tag.endswith("}text")]
    assert {"2", "4", "bits", "q", "k", "0", "1", "block"} <= set(shown)


def test_shades_rise_with_the_value():
    axis = Axis(low=1e-4, high=1e-2, log=True)
    shades = [shade(axis, 1e-4 * 10 ** (i / 10)) for i in range(21)]
    assert shades == sorted(shades)
    assert (shades[0], shades[10], shades[20]) == (0, N_SHADES // 2, N_SHADES - 1)
    assert (shade(axis, 0.0), shade(axis, 1.0)) == (0, N_SHADES - 1)


@pytest.mark.parametrize("n", [1, 30, 126, 5000])
def test_a_deep_model_fits_and_its_numbers_do_not_touch(n):
    svg = draw(columns=[str(i) for i in range(n)], cells={(0, n - 1): (2.0, "last")})
    (_, x, _), width = drawn_cells(svg)["last"], float(svg.get("width"))
    assert x < width
    beneath = [node for node in svg.iter() if node.tag.endswith("}text") and node.get("y") == "63"]
    labels = [(float(node.get("x")), words(node)) for node in beneath if words(node) != "block"]
    assert len(labels) == len(range(0, n, int(labels[1][1]))) if n > 1 else labels
    for (left, text), (right, other) in itertools.pairwise(labels):
        assert right - left >= 6 * (len(text) + len(other)) / 2


# ---- colours


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """The ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def schemes():
    light, dark = svg_style().split("@media (prefers-color-scheme: dark)")
    return [light, dark]


def named(scheme, name):
    return re.findall(rf"\.{name}\d+\{{fill:(#\w+)\}}", scheme)


def variable(scheme, name):
    return re.search(rf"--{name}:(#\w+)", scheme)[1]


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_text_and_marks_stand_out_from_the_paper(scheme):
    paper = variable(scheme, "paper")
    assert contrast(variable(scheme, "ink"), paper) >= 7
    for name in ("soft", "accent"):
        assert contrast(variable(scheme, name), paper) >= 4.5
    for colour in named(scheme, "series"):
        assert contrast(colour, paper) >= 3, colour


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_lightness_alone_tells_the_shades_apart(scheme):
    """From next to the paper towards the ink, so that more is always further from the paper."""
    shades = [contrast(colour, variable(scheme, "paper")) for colour in named(scheme, "shade")]
    assert len(shades) == N_SHADES
    assert all(other / one > 1.03 for one, other in itertools.pairwise(shades))
    assert shades[-1] > 7


def test_both_schemes_name_the_same_classes():
    light, dark = (set(re.findall(r"\.((?:shade|part|series|line)\d+)\{", scheme)) for scheme in schemes())
    assert light == dark
    assert "prefers-color-scheme: dark" in html_page("t", [])
