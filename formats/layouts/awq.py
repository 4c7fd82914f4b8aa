"""A layer as AWQ's `gemm` version has it: [in, out], eight outputs in a word, 4 bits alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import QuantizedLinear, group_index
from formats.layer.base import U8
from formats.layouts.affine import Affine, Arrays, full_zeros, group_size_of, plain_scales, take
from formats.layouts.bitstream import U32, pack_stream, unpack_stream

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
    if layer.input_order is not None:
        raise FormatError("groups in another order than the inputs: awq has none")
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


def unpack_awq(arrays: Arrays, shape: tuple[int, int], group_size: int) -> Affine:
    """What `pack_awq` packed; `scales` may be of any float.

    shape: [out, in] that the weight must have; group_size: -1 for one group a row
    """
    check_shape(shape, group_size_of(shape[1], group_size))
    (out_features, in_features), group_size = shape, group_size_of(shape[1], group_size)
    n_groups, n_words = in_features // group_size, out_features // len(ORDER)
    scales = take(arrays, "scales", "f", (n_groups, out_features))
    return Affine(
        codes=_unpack(take(arrays, "qweight", "i4", (in_features, n_words))),
        scales=np.ascontiguousarray(scales.T, np.float32),
        zeros=_unpack(take(arrays, "qzeros", "i4", (n_groups, n_words))).astype(np.int32),
        groups=group_index(in_features, group_size),
        bits=BITS[0],
        group_size=group_size,
    )


def _unpack(words: npt.NDArray[np.int32]) -> U8:
    """[n, out / 8] i32 -> [out, n] u8"""
    n, n_words = words.shape
    fields = np.empty((n, n_words, len(ORDER)), np.uint8)
    fields[:, :, ORDER] = unpack_stream(words.view(np.uint32), BITS[0], n_words * len(ORDER)).reshape(fields.shape)
    return np.ascontiguousarray(fields.reshape(n, -1).T)
