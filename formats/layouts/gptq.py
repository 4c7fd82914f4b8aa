"""A layer as GPTQ checkpoints have it: codes and zeros along the outputs of `[in, out]`, a group for every input.

`checkpoint_format` "gptq_v2" stores a zero as it is, "gptq" (version 1) stores it less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.errors import FormatError
from formats.layer import QuantizedLinear, group_index
from formats.layouts.affine import full_zeros, plain_scales
from formats.layouts.bitstream import WORD_BITS, pack_stream

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
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
        "g_idx": group_index(layer.in_features, layer.group_size).astype(np.int32),
    }
