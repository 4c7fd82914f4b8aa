"""A layer as AWQ's `gemm` version has it: [in, out], eight outputs in a word, 4 bits alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import QuantizedLinear
from formats.layer.base import U8
from formats.layouts.affine import full_zeros, plain_scales
from formats.layouts.bitstream import U32, pack_stream

BITS = (4,)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output of each eight that nibble j of a word belongs to, the lowest first."""


def check_shape(shape: tuple[int, int], group_size: int) -> None:
    """FormatError unless a row is whole groups and outputs fill whole words."""
    if shape[0] % len(ORDER):
        raise FormatError(f"{shape[0]} outputs: awq has multiples of {len(ORDER)} only; compress with --ignore")
    if group_size != -1 and shape[1] % group_size:
        raise FormatError(f"{shape[1]} inputs: awq has whole groups only, not of {group_size}")


def pack_awq(layer: QuantizedLinear) -> dict[str, npt.NDArray[Any]]:
    """qweight [in, out / 8] i32, qzeros [G, out / 8] i32, scales [G, out] f16.  layer: as `plain_scales` takes it"""
    return {
        "qweight": _pack(layer.codes).view(np.int32),
        "qzeros": _pack(full_zeros(layer)).view(np.int32),
        "scales": np.ascontiguousarray(plain_scales(layer).T),
    }


def _pack(fields: U8) -> U32:
    """[out, n] u8 -> [n, out / 8] u32"""
    out_features, n = fields.shape
    ordered = fields.T.reshape(n, out_features // len(ORDER), len(ORDER))[:, :, ORDER]
    return np.ascontiguousarray(pack_stream(ordered.reshape(n, out_features), BITS[0]))
