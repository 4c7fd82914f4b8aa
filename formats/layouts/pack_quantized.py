"""A layer as compressed-tensors' `pack-quantized` has it: rows [out] of codes along the inputs, symmetric."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import QuantizedLinear, group_index
from formats.layer.base import U8
from formats.layouts.affine import Affine, Arrays, group_size_of, plain_scales, take
from formats.layouts.bitstream import U32, WORD_BITS, pack_stream, stream_words, unpack_stream

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
    if layer.input_order is not None:
        raise FormatError("groups in another order than the inputs: compressed-tensors has none")
    return {
        "weight_packed": np.ascontiguousarray(pack_stream(layer.codes, layer.bits)).view(np.int32),
        "weight_scale": np.ascontiguousarray(plain_scales(layer)),
        "weight_shape": np.array(layer.shape, np.int64),
    }


def unpack_quantized(arrays: Arrays, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool) -> Affine:
    """What `pack_quantized` packed; besides, scales of any float, zeros, a group of each input, and older files.

    shape: [out, in] that the weight must have; group_size: -1 for one group a row
    """
    (out_features, in_features), group_size = shape, group_size_of(shape[1], group_size)
    if (stated := take(arrays, "weight_shape", "i8", (2,)).tolist()) != list(shape):
        raise FormatError(f"weight_shape is {stated}: must be {list(shape)}")
    n_groups, middle = -(-in_features // group_size), 1 << (bits - 1)
    zeros = np.full((out_features, n_groups), middle, np.int32)
    # Packed along the outputs, and a zero counts from the middle as a code does.
    if not symmetric or "weight_zero_point" in arrays:
        packed = take(arrays, "weight_zero_point", "i4", (stream_words(out_features, bits), n_groups))
        words = np.ascontiguousarray(packed.view(np.uint32).T)
        zeros = np.ascontiguousarray(unpack_stream(words, bits, out_features).T).astype(np.int32)
    groups = group_index(in_features, group_size)
    if "weight_g_idx" in arrays:
        given = arrays["weight_g_idx"]
        groups = take(arrays, "weight_g_idx", given.dtype.str if given.dtype.kind == "i" else "i4", (in_features,))
    return Affine(
        codes=_codes(arrays, shape, bits),
        scales=np.ascontiguousarray(take(arrays, "weight_scale", "f", (out_features, n_groups)), np.float32),
        zeros=zeros,
        groups=groups.astype(np.int64),
        bits=bits,
        group_size=group_size,
    )


def _codes(arrays: Arrays, shape: tuple[int, int], bits: int) -> U8:
    """Until late 2025 no code lay across two words: that such a file is longer shows it."""
    (out_features, in_features), per_word = shape, WORD_BITS // bits
    now, then = stream_words(in_features, bits), -(-in_features // per_word)
    if "weight_packed" in arrays and then != now and arrays["weight_packed"].shape == (out_features, then):
        words: U32 = take(arrays, "weight_packed", "i4", (out_features, then)).view(np.uint32)
        fields = words[:, :, None] >> (np.arange(per_word, dtype=np.uint32) * np.uint32(bits))
        codes = (fields & np.uint32((1 << bits) - 1)).astype(np.uint8).reshape(out_features, -1)
        return np.ascontiguousarray(codes[:, :in_features])
    words = take(arrays, "weight_packed", "i4", (out_features, now)).view(np.uint32)
    if WORD_BITS % bits and then == now and in_features > per_word:
        raise FormatError(f"rows of {in_features} codes of {bits} bits: older files and new ones cannot be told apart")
    return unpack_stream(words, bits, in_features)
