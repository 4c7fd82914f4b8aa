"""Axes: every value has its place, and ticks lie on them."""

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtool.pictures.axis import Axis, tick_label

FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


def test_shares_by_hand():
    assert [Axis(low=2, high=6).share(v) for v in (0, 2, 3, 6, 9)] == [0, 0, 0.25, 1, 1]
    assert Axis(low=0.01, high=100, log=True).share(1) == pytest.approx(0.5)


def test_margins_by_hand():
    axis = Axis.around([10, 20])
    assert (axis.low, axis.high) == pytest.approx((9.2, 20.8))  # 8 % of the span at either end
    axis = Axis.spanning([1e-4, 1e-2], log=True)
    assert (axis.low, axis.high) == pytest.approx((1e-4, 1e-2))


def test_least_spans_by_hand():
    axis = Axis.spanning([2, 3], least=4)
    assert (axis.low, axis.high) == pytest.approx((0.5, 4.5))
    axis = Axis.spanning([1e-2, 1e-2], log=True, least=1)
    assert (axis.low, axis.high) == pytest.approx((10**-2.5, 10**-1.5))
    assert Axis.spanning([2, 30], least=4) == Axis(low=2, high=30)
    assert Axis.spanning([1e308], log=True, least=1).high == pytest.approx(1e308)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (1.8, 8.9, False, [2, 4, 6, 8]),
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1536, False, [0, 500, 1000, 1500]),
        (3e-5, 0.4, True, [1e-4, 1e-3, 1e-2, 1e-1]),
        (20, 500, True, [20, 50, 100, 200, 500]),
        (23, 37, True, [25, 30, 35]),  # too short for powers: round values on a logarithmic axis
    ],
)
def test_ticks_by_hand(low, high, log, ticks):
    assert Axis(low=low, high=high, log=log).ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.05, "0.05"), (20, "20"), (30000, "30,000"), (5e-5, "5e-5"), (1.25e-7, "1.25e-7"), (2e6, "2e6")],
)
def test_tick_labels(value, label):
    assert tick_label(value) == label


def check(values, log):
    axis = Axis.around(values, log=log)
    assert -math.inf < axis.low < axis.high < math.inf
    shares = [axis.share(value) for value in sorted(values)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 13
    assert all(one < other for one, other in itertools.pairwise(ticks))
    slack = (axis.high / 2 - axis.low / 2) * 1e-6 + abs(axis.high) * 1e-8
    assert axis.low - slack <= ticks[0] and ticks[-1] <= axis.high + slack


@given(st.lists(FINITE, min_size=1, max_size=5))
@example([0.0, 1.7976931348623157e308])
@example([-1.7976931348623157e308, 1.7976931348623157e308])
@example([0.0, 5e-324])
def test_every_linear_axis(values):
    check(values, log=False)


@given(st.lists(POSITIVE, min_size=1, max_size=5))
@example([5e-324, 1.7976931348623157e308])
def test_every_logarithmic_axis(values):
    check(values, log=True)
