"""What all engines take: a `uniform` layer whose scales are fp16, with nothing stored apart."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import Layer, QuantizedLinear
from formats.layer.base import F16, U8


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
    )
