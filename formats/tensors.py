"""A stored tensor as torch has it: decoded, or as the bytes of its section."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from formats.encoding import Arrays
from formats.errors import error_context
from formats.header import TensorEntry
from formats.kernels.cpu import as_tensors
from formats.reader import QtmFile
from formats.section import part_arrays

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of `dense` tensors (SPEC 7.2)."""


def decode_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """The values [shape] f32 of a stored tensor, in the model's own orientation; a copy."""
    values = entry.encoding.decode(_checked_arrays(file, entry), entry.shape)
    return values.T.contiguous() if entry.transposed else values


def section_tensor(file: QtmFile, entry: TensorEntry) -> Tensor:
    """A section as a tensor [bytes] u8 over the mapped file: nothing is copied."""
    _checked_arrays(file, entry)
    return as_tensors({"section": np.frombuffer(file.section(entry), np.uint8)})["section"]


def _checked_arrays(file: QtmFile, entry: TensorEntry) -> Arrays:
    arrays = part_arrays(file.section(entry), entry.shape, entry.encoding)
    with error_context(f"{file.label}: {entry.label}"):
        entry.encoding.check_values(arrays, entry.shape)
    return arrays
