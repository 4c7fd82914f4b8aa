"""Compiled loops that look for scales and minima whose integers lose the least, each input's error weighted.

Every group of weights is small, so that all of it stays in registers and the first cache. A group's best scale for
given integers is a least-squares problem in closed form; which integers are best is searched by trying scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from formats.compiled import compiled

Array: TypeAlias = npt.NDArray[Any]
NO_MIN, ANY_MIN, FALLING_MIN = 0, 1, 2
"""Whether a group has a minimum beside its scale, and whether that may be above zero."""
STEPS = 9
"""Scales tried on each side of the one that spreads the group's range over all integers."""
STEP = np.float32(0.1)  # of an integer, at the far end of the range
REFINEMENTS = 2  # integers by the best scale, then the best scale of those integers


def _fit_groups(x: Array, w: Array, least: int, most: int, kind: int, scales: Array, minima: Array) -> None:
    """The scale and minimum of each group, such that integers from `least` to `most` lose least.

    x: [rows, G, g] f32; w: [G, g] f32, above 0; written are scales and minima [rows, G] f32
    """
    for row in numba.prange(len(x)):
        for group in range(x.shape[1]):
            if kind == NO_MIN:
                scales[row, group] = _fit_scale(x[row, group], w[group], np.float32(least), np.float32(most))
                minima[row, group] = 0
            else:
                scale, minimum = _fit_range(x[row, group], w[group], np.float32(most), kind)
                scales[row, group], minima[row, group] = scale, minimum


def _fit_scale(x: Array, w: Array, least: np.float32, most: np.float32) -> np.float32:
    peak = np.float32(0)
    for i in range(len(x)):
        if abs(x[i]) > abs(peak):
            peak = x[i]
    best, best_gain = np.float32(0), np.float32(0)
    if peak == 0:
        return best
    for side in range(2):
        end = least if side == 0 else most
        for step in range(-STEPS, STEPS + 1):
            scale, gain = _scale_of(x, w, (end + STEP * np.float32(step)) / peak, least, most)
            if gain > best_gain:
                best, best_gain = scale, gain
    for _ in range(REFINEMENTS):
        if best != 0:
            scale, gain = _scale_of(x, w, np.float32(1) / best, least, most)
            if gain > best_gain:
                best, best_gain = scale, gain
    return best


def _scale_of(
    x: Array, w: Array, inverse: np.float32, least: np.float32, most: np.float32
) -> tuple[np.float32, np.float32]:
    """The best scale of the integers that another one gives, and how much of the energy it explains."""
    xn, nn = np.float32(0), np.float32(0)
    for i in range(len(x)):
        n = min(max(np.rint(inverse * x[i]), least), most)
        xn += w[i] * x[i] * n
        nn += w[i] * n * n
    if nn <= 0:
        return np.float32(0), np.float32(0)
    return xn / nn, xn * xn / nn


def _fit_range(x: Array, w: Array, most: np.float32, kind: int) -> tuple[np.float32, np.float32]:
    low, high = x[0], x[0]
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    if kind == FALLING_MIN:
        low = min(low, np.float32(0))
    best, best_minimum, best_gain = np.float32(0), low, np.float32(-1)
    if high <= low:
        return best, best_minimum
    for step in range(-STEPS, STEPS + 1):
        scale, minimum, gain = _range_of(x, w, (most + STEP * np.float32(step)) / (high - low), low, most, kind)
        if gain > best_gain:
            best, best_minimum, best_gain = scale, minimum, gain
    for _ in range(REFINEMENTS):
        if best > 0:
            scale, minimum, gain = _range_of(x, w, np.float32(1) / best, best_minimum, most, kind)
            if gain > best_gain:
                best, best_minimum, best_gain = scale, minimum, gain
    return best, best_minimum


def _range_of(
    x: Array, w: Array, inverse: np.float32, low: np.float32, most: np.float32, kind: int
) -> tuple[np.float32, np.float32, np.float32]:
    """The best scale and minimum of the integers that others give, and how much of the energy they explain."""
    ww, wx, wn, nn, xn = np.float32(0), np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(x)):
        n = min(max(np.rint(inverse * (x[i] - low)), np.float32(0)), most)
        weighted = w[i] * n
        ww += w[i]
        wx += w[i] * x[i]
        wn += weighted
        nn += weighted * n
        xn += weighted * x[i]
    scale, minimum = np.float32(0), np.float32(0)
    spread = ww * nn - wn * wn
    if spread > 0:
        scale, minimum = (ww * xn - wn * wx) / spread, (nn * wx - wn * xn) / spread
    if (kind == FALLING_MIN and minimum > 0) or spread <= 0:
        minimum = np.float32(0)
        scale = xn / nn if nn > 0 else np.float32(0)
    if scale < 0:
        return np.float32(0), np.float32(0), np.float32(-1)
    return scale, minimum, scale * xn + minimum * wx


def _choose_statistics(
    x: Array, w: Array, scales: Array, minima: Array, d: Array, d_min: Array,
    code_range: tuple[int, int], scale_range: tuple[int, int], most_minimum: int,
    codes: Array, scale_codes: Array, minimum_codes: Array, sums: Array,
) -> None:  # fmt: skip
    """For given d and d_min of a super-block: each group's integers for scale and minimum, and the codes.

    x: [rows, S, G, g] f32; w: [S, G, g] f32; scales, minima: [rows, S, G] f32, what each group would like; d, d_min:
    [rows, S] f32. A weight is d * scale code * code - d_min * minimum code. Written are codes [rows, S, G, g] i8,
    scale_codes, minimum_codes [rows, S, G] i16, and sums [rows, S, 6] f64: of w times xu, xv, uu, uv, vv and of the
    loss, with u the scale code times the code and v the minimum code, negative.
    """
    for row in numba.prange(len(x)):
        for block in range(x.shape[1]):
            sums[row, block] = 0
            for group in range(x.shape[2]):
                first = _nearest(scales[row, block, group], d[row, block], scale_range)
                first_min = _nearest(-minima[row, block, group], d_min[row, block], (0, most_minimum))
                best, best_loss = (first, first_min), np.float32(np.inf)
                for s in range(max(first - 1, scale_range[0]), min(first + 1, scale_range[1]) + 1):
                    for m in range(max(first_min - 1, 0), min(first_min + 1, most_minimum) + 1):
                        loss = _encode_group(
                            x[row, block, group], w[block, group],
                            d[row, block] * np.float32(s), d_min[row, block] * np.float32(m),
                            code_range, codes[row, block, group],
                        )  # fmt: skip
                        if loss < best_loss:
                            best, best_loss = (s, m), loss
                s, m = best
                scale_codes[row, block, group], minimum_codes[row, block, group] = s, m
                _encode_group(
                    x[row, block, group], w[block, group],
                    d[row, block] * np.float32(s), d_min[row, block] * np.float32(m),
                    code_range, codes[row, block, group],
                )  # fmt: skip
                _add_sums(x[row, block, group], w[block, group], codes[row, block, group], s, m, sums[row, block])
                sums[row, block, 5] += best_loss


def _nearest(wanted: np.float32, unit: np.float32, limits: tuple[int, int]) -> int:
    if unit == 0:
        return 0
    return int(min(max(np.rint(wanted / unit), np.float32(limits[0])), np.float32(limits[1])))


def _encode_group(
    x: Array, w: Array, scale: np.float32, minimum: np.float32, code_range: tuple[int, int], codes: Array
) -> np.float32:
    """The codes nearest to (x + minimum) / scale; returns the loss."""
    least, most = np.float32(code_range[0]), np.float32(code_range[1])
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    loss = np.float32(0)
    for i in range(len(x)):
        n = min(max(np.rint(inverse * (x[i] + minimum)), least), most)
        error = x[i] - (scale * n - minimum)
        loss += w[i] * error * error
        codes[i] = np.int8(n)
    return loss


def _add_sums(x: Array, w: Array, codes: Array, s: int, m: int, sums: Array) -> None:
    for i in range(len(x)):
        u, v, weight = float(s) * float(codes[i]), -float(m), float(w[i])
        sums[0] += weight * x[i] * u
        sums[1] += weight * x[i] * v
        sums[2] += weight * u * u
        sums[3] += weight * u * v
        sums[4] += weight * v * v


def _inner(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function, nogil=True, fastmath=True)


def _outer(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function, parallel=True, fastmath=True)


# In the order in which they call each other: the inner ones are compiled into the outer ones.
_scale_of, _range_of, _nearest = _inner(_scale_of), _inner(_range_of), _inner(_nearest)
_encode_group, _add_sums = _inner(_encode_group), _inner(_add_sums)
_fit_scale, _fit_range = _inner(_fit_scale), _inner(_fit_range)
fit_groups, choose_statistics = _outer(_fit_groups), _outer(_choose_statistics)
