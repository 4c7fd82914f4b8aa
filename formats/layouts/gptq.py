"""A layer as GPTQ checkpoints have it: codes and zeros along the outputs of `[in, out]`, a group for every input.

`checkpoint_format` "gptq_v2" stores a zero as it is, "gptq" (version 1) stores it less one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import QuantizedLinear, group_index
from formats.layouts.affine import Affine, Arrays, full_zeros, group_size_of, plain_scales, take
from formats.layouts.bitstream import WORD_BITS, pack_stream, unpack_stream

BITS = (2, 3, 4, 8)
FORMATS = {1: "gptq", 2: "gptq_v2"}
"""Version -> `checkpoint_format`."""


def check_shape(shape: tuple[int, int]) -> None:
    """FormatError unless whole words hold each input's codes and each group's zeros."""
    for size, what in zip(shape, ("outputs", "inputs"), strict=True):
        if size % WORD_BITS:
            raise FormatError(f"{size} {what}: gptq has multiples of {WORD_BITS} only; compress with --ignore")


def pack_gptq(layer: QuantizedLinear, version: int) -> dict[str, npt.NDArray[Any]]:
    """qweight [in * bits / 32, out] i32, qzeros [G, out * bits / 32] i32, scales [G, out] f16, g_idx [in] i32.

    layer: of BITS, as `plain_scales` takes it. FormatError for a zero of 0 in version 1, which it cannot hold.
    """
    check_shape(layer.shape)
    zeros = full_zeros(layer)
    if version == 1:
        if not zeros.all():
            raise FormatError("a zero is 0: version 1 of gptq has 1 and more; write version 2")
        zeros = zeros - np.uint8(1)
    return {
        "qweight": np.ascontiguousarray(pack_stream(layer.codes, layer.bits).T).view(np.int32),
        "qzeros": np.ascontiguousarray(pack_stream(np.ascontiguousarray(zeros.T), layer.bits)).view(np.int32),
        "scales": np.ascontiguousarray(plain_scales(layer).T),
        "g_idx": layer.groups_of_inputs().astype(np.int32),
    }


def unpack_gptq(arrays: Arrays, shape: tuple[int, int], bits: int, group_size: int, version: int) -> Affine:
    """What `pack_gptq` packed; `scales` may be of any float, `g_idx` any group of each input.

    shape: [out, in] that the weight must have; group_size: -1 for one group a row
    """
    check_shape(shape)
    (out_features, in_features), group_size = shape, group_size_of(shape[1], group_size)
    n_groups = -(-in_features // group_size)
    qweight = take(arrays, "qweight", "i4", (in_features * bits // WORD_BITS, out_features))
    qzeros = take(arrays, "qzeros", "i4", (n_groups, out_features * bits // WORD_BITS))
    scales = take(arrays, "scales", "f", (n_groups, out_features))
    groups = group_index(in_features, group_size)
    if "g_idx" in arrays:
        groups = take(arrays, "g_idx", "i4", (in_features,)).astype(np.int64)
    zeros = unpack_stream(qzeros.view(np.uint32), bits, out_features).T.astype(np.int32)
    return Affine(
        codes=unpack_stream(np.ascontiguousarray(qweight.view(np.uint32).T), bits, in_features),
        scales=np.ascontiguousarray(scales.T, np.float32),
        zeros=np.ascontiguousarray(zeros + (1 if version == 1 else 0)),
        groups=groups,
        bits=bits,
        group_size=group_size,
    )
