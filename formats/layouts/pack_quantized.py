"""A layer as compressed-tensors' `pack-quantized` has it: rows [out] of codes along the inputs, symmetric."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import QuantizedLinear
from formats.layouts.affine import plain_scales
from formats.layouts.bitstream import pack_stream

BITS = (2, 3, 4, 5, 6, 7, 8)


def check_shape(shape: tuple[int, int], group_size: int) -> None:
    """FormatError unless a row is whole groups."""
    if group_size != -1 and shape[1] % group_size:
        raise FormatError(f"{shape[1]} inputs: compressed-tensors has whole groups only, not of {group_size}")


def pack_quantized(layer: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
    """weight_packed [out, ceil(in * bits / 32)] i32, weight_scale [out, G] f16, weight_shape [2] i64.

    layer: symmetric, as `plain_scales` takes it. A code counts from the lowest: stored is what we store.
    """
    if not layer.symmetric:
        raise FormatError("has zeros: compressed-tensors loads symmetric layers only")
    return {
        "weight_packed": np.ascontiguousarray(pack_stream(layer.codes, layer.bits)).view(np.int32),
        "weight_scale": np.ascontiguousarray(plain_scales(layer)),
        "weight_shape": np.array(layer.shape, np.int64),
    }
