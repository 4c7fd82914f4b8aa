"""A weight that no block type holds, as the blocks that lose the least: every input's error is weighted.

The weights are those of the diagonal of the Hessian, the mean squares of the inputs: what is minimised is the error of
the layer's output, as far as inputs vary independently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.ggml import fit_loops
from formats.ggml.blocks import F16, F32, FORMS, Blocks
from formats.ggml.fit_loops import ANY_MIN, FALLING_MIN, NO_MIN
from formats.ggml.k_blocks import KBlocks
from formats.ggml.types import BLOCK, K_FORMS, SUPER_BLOCK, KForm

Array = npt.NDArray[Any]
ROUNDS = 3
"""Times that d and d_min are fitted again to the integers that were chosen for them."""
LEAST_IMPORTANCE = 1e-4
"""Of the mean: an input that was always zero where it was measured may not be so elsewhere."""
PIECE_WEIGHTS = 1 << 22
"""Weights fitted at a time, so that the temporaries stay small."""


def fit(weight: F32, kind: str, importance: Array | None = None) -> Blocks | KBlocks:
    """The blocks of a type with the least error.  weight: [rows, in] f32; importance: [in], or None for all alike"""
    weights = _weights(importance, weight.shape[1])
    step = max(1, PIECE_WEIGHTS // weight.shape[1])
    pieces = [weight[i : i + step] for i in range(0, len(weight), step)]
    fit_piece: Callable[[F32, str, F32], Any] = _fit_blocks if kind in FORMS else _fit_k
    whole: Blocks | KBlocks = _joined([fit_piece(piece, kind, weights) for piece in pieces])
    return whole


def _weights(importance: Array | None, n_inputs: int) -> F32:
    """[in] f32, of mean 1."""
    if importance is None or not importance.any():
        return np.ones(n_inputs, np.float32)
    relative = np.asarray(importance, np.float64) / np.mean(importance, dtype=np.float64)
    return np.maximum(relative, LEAST_IMPORTANCE).astype(np.float32)


def _fit_blocks(weight: F32, kind: str, weights: F32) -> Blocks:
    form = FORMS[kind]
    x = np.ascontiguousarray(weight, np.float32).reshape(len(weight), -1, BLOCK)
    most = (1 << form.bits) - 1 - form.offset
    scales, minima = _fit_groups(x, weights.reshape(-1, BLOCK), -form.offset, most, ANY_MIN if form.has_min else NO_MIN)
    d, m = _as_f16(scales), _as_f16(minima)
    step, base = d.astype(np.float32)[..., None], m.astype(np.float32)[..., None]
    integers = np.rint(np.divide(x - base, step, out=np.zeros_like(x), where=step != 0))
    codes = (np.clip(integers, -form.offset, most) + form.offset).astype(np.uint8)
    return Blocks(kind, codes.reshape(weight.shape), d, m if form.has_min else None)


def _fit_k(weight: F32, kind: str, weights: F32) -> KBlocks:
    form = K_FORMS[kind]
    shape = len(weight), weight.shape[1] // SUPER_BLOCK, form.n_groups, form.group
    x, w = np.ascontiguousarray(weight, np.float32).reshape(shape), weights.reshape(shape[1:])
    code_range, scale_range, most_minimum = _ranges(form)
    flat = x.reshape(shape[0], -1, form.group)
    minimum = FALLING_MIN if form.has_min else NO_MIN
    scales, minima = (
        found.reshape(shape[:3]) for found in _fit_groups(flat, w.reshape(-1, form.group), *code_range, minimum)
    )
    d = _unit(scales, scale_range[1])
    d_min = _unit(minima, max(most_minimum, 1))
    best = _Chosen(x, w, scales, minima, d, d_min, form)
    for _ in range(ROUNDS):
        trial = _Chosen(x, w, scales, minima, *best.refitted(), form)
        best.take(trial)
    return best.blocks(kind)


class _Chosen:
    """Integers for given d and d_min [rows, S] of every super-block, and what they lose."""

    def __init__(self, x: F32, w: F32, scales: F32, minima: F32, d: F16, d_min: F16, form: KForm) -> None:
        self.d, self.d_min, self.form = d, d_min, form
        self.codes = np.empty(x.shape, np.int8)
        self.scales, self.minima = (np.empty(scales.shape, np.int16) for _ in range(2))
        self.sums = np.empty((*d.shape, 6))
        fit_loops.choose_statistics(
            x, w, scales, minima, d.astype(np.float32), d_min.astype(np.float32), *_ranges(form),
            self.codes, self.scales, self.minima, self.sums,
        )  # fmt: skip

    def refitted(self) -> tuple[F16, F16]:
        """The d and d_min with which these integers lose least: two unknowns, least squares."""
        xu, xv, uu, uv, vv, _ = np.moveaxis(self.sums, -1, 0)
        spread = uu * vv - uv * uv
        both = spread > 1e-9 * uu * vv
        safe = np.where(both, spread, 1)
        d = np.where(both, (xu * vv - xv * uv) / safe, np.divide(xu, uu, out=np.zeros_like(xu), where=uu > 0))
        d_min = np.where(both, (xv * uu - xu * uv) / safe, 0)
        falls = d_min < 0  # no minimum would be better than the best one of its sign
        d[falls] = np.divide(xu, uu, out=np.zeros_like(xu), where=uu > 0)[falls]
        return _as_f16(d), _as_f16(np.maximum(d_min, 0))

    def take(self, other: _Chosen) -> None:
        """Those super-blocks of another choice that lose less."""
        better = other.sums[..., 5] < self.sums[..., 5]
        for name in ("d", "d_min", "codes", "scales", "minima", "sums"):
            getattr(self, name)[better] = getattr(other, name)[better]

    def blocks(self, kind: str) -> KBlocks:
        (least, _), (least_scale, _), _ = _ranges(self.form)
        rows = len(self.d)
        codes = (self.codes - np.int16(least)).astype(np.uint8).reshape(rows, -1)
        scales = (self.scales - least_scale).astype(np.uint8).reshape(rows, -1)
        if not self.form.has_min:
            return KBlocks(kind, codes, scales, self.d)
        return KBlocks(kind, codes, scales, self.d, self.minima.astype(np.uint8).reshape(rows, -1), self.d_min)


def _fit_groups(x: F32, weights: F32, least: int, most: int, kind: int) -> tuple[F32, F32]:
    """Scale and minimum of each group.  x: [rows, G, g] f32; weights: [G, g] f32 -> twice [rows, G] f32"""
    scales, minima = np.empty(x.shape[:2], np.float32), np.empty(x.shape[:2], np.float32)
    fit_loops.fit_groups(x, np.ascontiguousarray(weights), least, most, kind, scales, minima)
    return scales, minima


def _ranges(form: KForm) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Least and most of codes, of scales, and the most of minima."""
    if form.has_min:
        most = (1 << form.stat_bits) - 1
        return (0, (1 << form.bits) - 1), (0, most), most
    half, half_stat = 1 << (form.bits - 1), 1 << (form.stat_bits - 1)
    return (-half, half - 1), (-half_stat, half_stat - 1), 0


def _unit(wanted: F32, most: int) -> F16:
    """What the largest of a super-block's statistics is `most` times.  [rows, S, G] f32 -> [rows, S] f16"""
    return _as_f16(np.abs(wanted).max(axis=-1) / most)


def _as_f16(values: Array) -> F16:
    """Rounded; what is too large for f16 becomes its largest."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(values, -limit, limit).astype(np.float16)


def _joined(pieces: list[Any]) -> Any:
    """Blocks of rows that follow each other as one."""
    if len(pieces) == 1:
        return pieces[0]
    kind = type(pieces[0])
    names = [name for name in kind.__dataclass_fields__ if name != "kind"]
    columns = {name: [getattr(piece, name) for piece in pieces] for name in names}
    whole = {name: None if column[0] is None else np.concatenate(column) for name, column in columns.items()}
    return kind(pieces[0].kind, **whole)
