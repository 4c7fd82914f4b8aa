"""What engines have: scale * (code - zero) by row and group. And the `uniform` layers that are as simple."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import Layer, QuantizedLinear, group_index
from formats.layer.base import F16, F32, U8, decode

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
LARGEST_SCALE = 2.0**64
"""In magnitude, so that no weight overflows."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Affine:
    """A weight [out, in] as an engine stores it, which can be more than a layer of ours holds.

    codes:  [out, in] u8 < 2**bits
    scales: [out, G] f32, finite
    zeros:  [out, G] i32: what a code is counted from, up to 2**bits
    groups: [in] i64 < G: the group of each input
    group_size: inputs of a group
    """

    codes: U8
    scales: F32
    zeros: npt.NDArray[np.int32]
    groups: npt.NDArray[np.int64]
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        largest = float(np.abs(self.scales).max())
        if not largest <= LARGEST_SCALE:  # so, and a NaN is refused too
            raise FormatError("a scale is NaN, infinite or beyond 2**64")
        n_groups = self.scales.shape[1]
        least, most = int(self.groups.min()), int(self.groups.max())
        if least < 0 or most >= n_groups:
            raise FormatError(f"g_idx goes from {least} to {most}: must be within the {n_groups} groups")

    def obstacle(self) -> str | None:
        """Why no layer of ours has the same values; None where one has."""
        with np.errstate(over="ignore"):  # to infinity, which is not the scale
            halves = self.scales.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), self.scales):
            return "scales beyond fp16"
        if int(self.zeros.max()) >= 1 << self.bits:
            return f"a zero of {int(self.zeros.max())}"
        if not np.array_equal(self._places() // self.group_size, self.groups):
            return "groups that are not of one size"
        return None

    def _places(self) -> npt.NDArray[np.int64]:
        """The place of each input where those of a group follow each other, as they stand within it."""
        places = np.empty(len(self.groups), np.int64)
        places[np.argsort(self.groups, kind="stable")] = np.arange(len(places))
        return places

    def layer(self) -> QuantizedLinear:
        """The layer with the same values, unless there is an obstacle; zeros that are all in the middle are none."""
        is_in_order = np.array_equal(self.groups, group_index(len(self.groups), self.group_size))
        is_symmetric = bool((self.zeros == 1 << (self.bits - 1)).all())
        return QuantizedLinear(
            codes=self.codes,
            scales=self.scales.astype(np.float16),
            zeros=None if is_symmetric else self.zeros.astype(np.uint8),
            bits=self.bits,
            group_size=self.group_size,
            input_order=None if is_in_order else self._places().astype(np.uint32),
        )

    def dequantize(self) -> F32:
        """[out, in] f32"""
        scales, zeros = self.scales[:, self.groups], self.zeros[:, self.groups].astype(np.float32)
        return decode(self.codes.astype(np.float32), scales, zeros)


def take(arrays: Arrays, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One of a module's arrays; FormatError unless it is there, of this type and shape.  dtype: "f": any float"""
    if name not in arrays:
        raise FormatError(f"{name} is missing")
    array = arrays[name]
    is_type = array.dtype.kind == "f" if dtype == "f" else array.dtype == np.dtype(dtype)
    if not is_type or array.shape != shape:
        want = f"{'float' if dtype == 'f' else dtype}{list(shape)}"
        raise FormatError(f"{name} is {array.dtype}{list(array.shape)}: must be {want}")
    return array


def group_size_of(in_features: int, group_size: int) -> int:
    """That of a row, where -1 is the whole of it."""
    return in_features if group_size == -1 else min(group_size, in_features)


def is_affine(layer: Layer) -> bool:
    """Whether scale * (code - zero), both by row and group, is all there is to it."""
    return (
        isinstance(layer, QuantizedLinear)
        and isinstance(layer.scales, np.ndarray)
        and layer.outliers is None
        and layer.input_scales is None
    )


def plain_scales(layer: QuantizedLinear) -> F16:
    """[out, G] f16"""
    if not is_affine(layer):
        raise FormatError("not scale * (code - zero) alone: no other engine has what it has besides")
    return cast(F16, layer.scales)


def full_zeros(layer: QuantizedLinear) -> U8:
    """Zeros, those of a symmetric layer too.  -> [out, G] u8"""
    if layer.zeros is None:
        return np.full(layer.groups, 1 << (layer.bits - 1), np.uint8)
    return cast(U8, layer.zeros)


def take_rows(layer: QuantizedLinear, rows: npt.NDArray[np.int64]) -> QuantizedLinear:
    """The layer of some of an affine layer's outputs."""
    return QuantizedLinear(
        codes=np.ascontiguousarray(layer.codes[rows]),
        scales=np.ascontiguousarray(plain_scales(layer)[rows]),
        zeros=None if layer.zeros is None else np.ascontiguousarray(full_zeros(layer)[rows]),
        bits=layer.bits,
        group_size=layer.group_size,
        input_order=layer.input_order,
    )
