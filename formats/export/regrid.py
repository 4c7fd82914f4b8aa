"""A layer on the grid that an engine has: as it is where that can be, else rounded to the nearest weights again."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.encoding import MatrixEncoding
from formats.encoding.affine import Affine
from formats.encoding.grouped import GroupedEncoding
from formats.encoding.int8_rows import Int8Rows
from formats.encoding.uniform import Uniform
from formats.layer import Int8Linear, Layer, QuantizedLinear, group_index, statistic_values
from formats.layer.base import F16, F32, U8, decode

Index: TypeAlias = npt.NDArray[np.int64]
SHRINKS = (1.0, 0.9, 0.8, 0.7)
"""Parts of a group's range that are tried: clipping a few weights lets all others have finer steps."""
GROUP_SIZES = (128, 64, 32)
"""That all engines know, the smallest file first."""
LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Form:
    """What an engine is told of a layer. group_size: inputs that share a scale; -1: a row."""

    bits: int
    group_size: int
    symmetric: bool
    is_ordered: bool = False  # by an order of the inputs (SPEC 7.8)


@dataclass(frozen=True, slots=True)
class Carrier:
    """What a format of an engine can hold of a layer."""

    name: str
    bits: tuple[int, ...]  # rising
    asymmetric: bool = True
    least_zero: int = 0
    ordered: bool = False  # whether inputs of a group may lie anywhere
    regrouped: int = -1  # the groups of layers that are rounded again and not `uniform` nor rows of bytes

    def form(self, encoding: MatrixEncoding, shape: tuple[int, ...]) -> Form:
        """That of a layer once it is in the format: fewer bits go into more, which changes no value."""
        bits = encoding.describe(shape).bits
        group_size = encoding.group_size if isinstance(encoding, GroupedEncoding) else -1
        symmetric = encoding.symmetric if isinstance(encoding, Uniform | Affine) else True
        group_size = -1 if group_size == shape[1] else group_size
        if not isinstance(encoding, Uniform | Int8Rows):
            group_size = self.regrouped
        wide = min((own for own in self.bits if own >= bits), default=self.bits[-1])
        is_ordered = self.ordered and isinstance(encoding, Uniform) and encoding.input_order
        return Form(wide, group_size, symmetric or not self.asymmetric, is_ordered)

    def obstacle(self, encoding: MatrixEncoding) -> str | None:
        """What the format has no place for, in words; None where it holds all layers stored so, but for their zeros."""
        if not isinstance(encoding, Uniform):
            return f"weights stored as {encoding.name}"
        if encoding.outliers:
            return "outliers"
        if encoding.stat_bits:
            return "statistics in two levels"
        if encoding.input_scales:
            return "input scales"
        if encoding.input_order and not self.ordered:
            return "groups in another order than the inputs"
        if encoding.bits > self.bits[-1]:
            return f"{encoding.bits} bits"
        if not self.asymmetric and not encoding.symmetric:
            return "zeros"
        return None

    def depends_on_zeros(self, encoding: MatrixEncoding) -> bool:
        """Whether only the layer itself tells whether the format holds it."""
        return self.least_zero > 0 and isinstance(encoding, Uniform) and not encoding.symmetric

    def carry(self, layer: Layer) -> tuple[QuantizedLinear, str | None]:
        """The layer as the format holds it, and what that changed; None if nothing."""
        form, reason = self.form(layer.encoding, layer.shape), self.obstacle(layer.encoding)
        if reason is None:
            assert isinstance(layer, QuantizedLinear)
            zeros = layer.zeros
            if not isinstance(zeros, np.ndarray) or int(zeros.min()) >= self.least_zero:
                return widened(layer, form.bits), None
            reason = f"zeros below {self.least_zero}"
        return regridded(layer, form, self.least_zero), reason


def common_group_size(encodings: Iterable[tuple[MatrixEncoding, tuple[int, ...]]]) -> int:
    """One for all: the largest that engines know, that cuts each row into whole groups, and that is no larger than the
    groups of any layer which has more than one in a row; the smallest where groups are smaller yet; -1: none.
    """
    found = list(encodings)
    own = [size for encoding, shape in found if (size := getattr(encoding, "group_size", -1)) not in (-1, shape[1])]
    whole = [size for size in GROUP_SIZES if not any(shape[1] % size for _, shape in found)]
    return next((size for size in whole if size <= min(own, default=size)), whole[-1] if whole else -1)


def widened(layer: QuantizedLinear, bits: int) -> QuantizedLinear:
    """The same values in codes of more bits."""
    if bits == layer.bits:
        return layer
    # The middle of a symmetric grid moves, and the codes with it.
    shift = (1 << (bits - 1)) - (1 << (layer.bits - 1)) if layer.symmetric else 0
    codes = layer.codes + np.uint8(shift)
    return replace(layer, codes=codes, bits=bits)


def regridded(layer: Layer, form: Form, least_zero: int = 0) -> QuantizedLinear:
    """The nearest weights of a few grids, the best of them for each group."""
    group_size = layer.in_features if form.group_size == -1 else form.group_size
    weight, index = layer.dequantize(), group_index(layer.in_features, group_size)
    starts = np.arange(0, layer.in_features, group_size)
    fits = (
        _fit(weight, scales, zeros, form.bits, index, starts)
        for scales, zeros in _grids(layer, weight, starts, form, least_zero)
    )
    with np.errstate(over="ignore"):  # a hostile file's weights: an error beyond f32 is no smaller than any other
        best = functools.reduce(lambda one, other: _better(one, other, index), fits)
    zeros = None if form.symmetric else best.zeros
    return QuantizedLinear(codes=best.codes, scales=best.scales, zeros=zeros, bits=form.bits, group_size=group_size)


class _Fit(NamedTuple):
    """scales [out, G] f16, zeros [out, G] u8, codes [out, in] u8, and the squared errors of each group [out, G] f32"""

    scales: F16
    zeros: U8
    codes: U8
    errors: F32


def _fit(weight: F32, scales: F16, zeros: U8, bits: int, index: Index, starts: Index) -> _Fit:
    """The nearest weights of one grid."""
    steps, middles = _spread(scales, index), _spread(zeros, index)
    codes = np.divide(weight, steps, out=np.zeros_like(weight), where=steps != 0)
    codes = np.clip(np.rint(codes) + middles, 0, (1 << bits) - 1)
    errors = np.add.reduceat(np.square(decode(codes, steps, middles) - weight), starts, axis=1)
    return _Fit(scales, zeros, codes.astype(np.uint8), errors)


def _better(one: _Fit, other: _Fit, index: Index) -> _Fit:
    is_other = other.errors < one.errors  # [out, G]
    return _Fit(
        np.where(is_other, other.scales, one.scales),
        np.where(is_other, other.zeros, one.zeros),
        np.where(is_other[:, index], other.codes, one.codes),
        np.minimum(one.errors, other.errors),
    )


def _grids(layer: Layer, weight: F32, starts: Index, form: Form, least_zero: int) -> Iterator[tuple[F16, U8]]:
    """Scales [out, G] f16 and zeros [out, G] u8 < 2**bits: the layer's own as far as it has any, then ranges."""
    middle, last = 1 << (form.bits - 1), (1 << form.bits) - 1
    low = np.minimum(np.minimum.reduceat(weight, starts, axis=1), 0)
    high = np.maximum(np.maximum.reduceat(weight, starts, axis=1), 0)
    span = 2 * np.maximum(-low, high) if form.symmetric else high - low
    grids = [(span * np.float32(shrink / last), -low * np.float32(shrink)) for shrink in SHRINKS]
    if (own := _own_grid(layer, middle)) is not None:
        grids.insert(0, (own[0], own[0] * own[1]))
    for steps, depth in grids:  # depth: what a code of 0 is below zero
        scales = np.clip(steps, -LARGEST_F16, LARGEST_F16).astype(np.float16)
        zeros = np.divide(depth, steps, out=np.zeros_like(depth), where=steps != 0)
        zeros = np.full_like(depth, middle) if form.symmetric else zeros
        yield scales, np.clip(np.rint(zeros), least_zero, last).astype(np.uint8)


def _own_grid(layer: Layer, middle: int) -> tuple[F32, F32] | None:
    """Scales and zeros [out, G] f32 of a layer in equal steps that are the same for all inputs of a group."""
    if isinstance(layer, Int8Linear):
        return layer.scales[:, None], np.full((layer.out_features, 1), middle, np.float32)
    if not isinstance(layer, QuantizedLinear) or layer.input_order is not None:
        return None
    scales = statistic_values(layer.scales)
    return scales, np.full_like(scales, middle) if layer.zeros is None else statistic_values(layer.zeros)


def _spread(statistic: npt.NDArray[Any], index: Index) -> F32:
    return statistic.astype(np.float32)[:, index]
