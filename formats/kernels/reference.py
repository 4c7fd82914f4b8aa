"""The truth: numpy decodes the section as SPEC 7 reads, and float64 multiplies. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape
from formats.section import unpack


def multiply(x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """See `Kernels`."""
    return (x.double() @ decode(section, encoding, shape, torch.float64).T).to(x.dtype)


def decode_rows(section: Tensor, rows: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """See `Kernels`."""
    return decode(section, encoding, shape, torch.float32)[rows]


def decode(section: Tensor, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> Tensor:
    """See `Kernels`."""
    return torch.from_numpy(unpack(section.numpy().data, shape, encoding).dequantize()).to(dtype)
