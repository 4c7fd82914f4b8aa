"""STAGE 5, pack: the bytes of tensors that no solver has touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.encoding import Dense
from formats.section import pack, part_arrays
from qtool.gptq import rtn_quantize
from qtool.plan import TensorPlan

ROWS_AT_A_TIME = 4096
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def dense_section(values: Tensor, tensor: TensorPlan) -> bytes:
    """The values in the type that they had in the source."""
    assert isinstance(tensor.encoding, Dense)
    stored = values.to(DTYPES[tensor.encoding.dtype]).contiguous()
    return stored.reshape(-1).view(torch.uint8).numpy().tobytes()


def rounded_section(values: Tensor, tensor: TensorPlan) -> tuple[bytearray, Tensor]:
    """(section, decoded values) of an embedding rounded to nearest, a stripe of rows at a time."""
    assert tensor.spec is not None
    parts: dict[str, list[np.ndarray[Any, Any]]] = {}
    decoded = torch.empty_like(values)
    for rows, target in zip(values.split(ROWS_AT_A_TIME), decoded.split(ROWS_AT_A_TIME), strict=True):
        solution = rtn_quantize(rows, tensor.spec)
        target.copy_(solution.decoded)
        for name, array in part_arrays(pack(solution.layer), tuple(rows.shape), tensor.encoding).items():
            parts.setdefault(name, []).append(array)
    section = bytearray(tensor.encoding.section_bytes(tensor.shape))
    for name, array in part_arrays(section, tensor.shape, tensor.encoding).items():
        np.concatenate(parts[name], out=array)
    return section, decoded
