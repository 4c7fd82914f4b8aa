"""STAGE 5, pack: the bytes of tensors that no solver has touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.encoding import Dense, Uniform
from formats.section import pack, part_arrays
from qtool.gptq import rtn_quantize
from qtool.plan import TensorPlan

MAX_ELEMENTS = 1 << 20
"""Weights rounded at a time: the temporaries then weigh little against the tensor itself."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def dense_section(values: Tensor, tensor: TensorPlan) -> np.ndarray[Any, Any]:
    """The values in the type that they had in the source."""
    assert isinstance(tensor.encoding, Dense)
    stored = values.to(DTYPES[tensor.encoding.dtype]).contiguous()
    return stored.reshape(-1).view(torch.uint8).numpy()


def rounded_section(values: Tensor, tensor: TensorPlan) -> bytearray:
    """The section of an embedding rounded to nearest, a stripe of rows at a time; `values` become the decoded ones."""
    spec, encoding = tensor.spec, tensor.encoding
    assert spec is not None and isinstance(encoding, Uniform) and encoding.symmetric  # zeros lie in no rows
    section = bytearray(encoding.section_bytes(tensor.shape))
    parts = part_arrays(section, tensor.shape, encoding)
    step = max(1, MAX_ELEMENTS // tensor.shape[1])
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        solution = rtn_quantize(rows, spec)
        rows.copy_(solution.decoded)
        for name, array in part_arrays(pack(solution.layer), tuple(rows.shape), encoding).items():
            parts[name][start : start + len(rows)] = array
    return section
