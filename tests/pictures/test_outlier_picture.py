"""Where outliers sit: counts by hand, and the picture of them."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_tools import of_class, parse, svgs

from qtool.pictures.outlier_picture import describe_density, draw_density
from qtool.pictures.page import standalone_svg
from qtool.pictures.positions import MAX_BINS, Positions, density, fullest, positions_of_parts


def positions_of(mask):
    mask = np.asarray(mask, bool)
    row_ptr = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return Positions(shape=mask.shape, row_ptr=row_ptr, columns=np.nonzero(mask)[1])


def test_positions_of_sparse_parts():
    parts = {
        "codes.4": np.zeros((3, 1), np.uint32),
        "outlier_rows": np.array([0, 2, 2, 3], np.uint32),
        "outlier_columns": np.array([1, 4, 0], np.uint16),
        "outlier_values": np.ones(3, np.float16),
    }
    found = density(positions_of_parts(parts, (3, 5)))
    assert found.rows.tolist() == [2, 0, 1]
    assert found.columns.tolist() == [1, 1, 0, 0, 1]
    assert found.bins.tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 0, 0, 0, 0]]


def test_positions_of_whole_columns():
    found = density(positions_of_parts({"columns": np.array([1, 3], np.uint32)}, (3, 4)))
    assert found.rows.tolist() == [2, 2, 2]
    assert found.columns.tolist() == [0, 3, 0, 3]


def test_positions_of_parts_without_outliers():
    found = positions_of_parts({"codes.4": np.zeros((3, 1), np.uint32)}, (3, 5))
    assert (found.row_ptr.tolist(), found.columns.tolist()) == ([0, 0, 0, 0], [])


def test_a_large_matrix_is_counted_in_rectangles():
    mask = np.zeros((300, 1000), bool)
    mask[:, 999] = True
    mask[0, 0] = True
    found = density(positions_of(mask))
    assert found.bins.shape == (MAX_BINS, MAX_BINS)
    assert found.bins[:, 1:-1].sum() == 0
    heights = np.bincount(np.arange(300) * 256 // 300)
    width = sum(1000 * 255 <= column * 256 < 1000 * 256 for column in range(1000))
    assert found.bins[:, -1] == pytest.approx(np.full(256, 1 / width))
    assert found.bins[0, 0] == pytest.approx(1 / (heights[0] * 4))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_no_outlier_is_lost(n_rows, n_columns, seed):
    mask = np.random.default_rng(seed).random((n_rows, n_columns)) < 0.02
    found = density(positions_of(mask))
    assert (found.rows == mask.sum(1)).all()
    assert (found.columns == mask.sum(0)).all()
    assert (found.bins <= 1).all()
    assert (found.bins > 0).sum() <= mask.sum()
    assert (found.bins > 0).any() == mask.any()


def test_fullest_by_hand():
    counts = np.array([7, 1, 1, 1] + [0] * 196)
    assert fullest(counts) == (2, 0.8)
    assert fullest(np.array([3, 1])) == (1, 0.75)


def test_the_pattern_in_words():
    mask = np.zeros((100, 200), bool)
    mask[:50, 7] = True
    mask[3, 100:150] = True
    assert describe_density(density(positions_of(mask))) == (
        "100 outliers, 0.500% of 100 × 200 weights. The fullest 2 of 200 columns hold 51.0% of them "
        "(spread evenly: 1.0%), the fullest 1 of 100 rows 51.0% (evenly: 1.0%). "
        "Column 7 has most, 50, and row 3, 51."
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 3), (300, 300)])
def test_the_picture_has_a_stroke_for_every_bin(shape):
    mask = np.random.default_rng(0).random(shape) < 0.1
    mask[0, 0] = True
    found = density(positions_of(mask))
    svg = svgs(parse(standalone_svg(draw_density(found, "T"))))["T"]
    drawn = np.zeros(found.bins.shape)
    shades = np.zeros(found.bins.shape)
    for path in of_class(svg, "line"):
        for start, row, length in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.get("d")):
            place = int(row), slice(int(start), int(start) + int(length))
            drawn[place] += 1
            shades[place] = int(path.get("class").removeprefix("line"))
    assert (drawn == (found.bins > 0)).all()
    order = np.argsort(found.bins, axis=None)
    assert (np.diff(shades.flat[order]) >= 0).all()
    assert len(of_class(svg, "count")) == 2
