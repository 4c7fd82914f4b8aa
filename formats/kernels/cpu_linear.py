"""Torch on the CPU: a stripe of rows is decoded and multiplied at a time, so no weight ever stands whole."""

from __future__ import annotations

import torch
from torch import Tensor

from formats.encoding import INPUT_SCALES, MatrixEncoding, Shape
from formats.section import part_arrays

# As `as_tensors` has them: words carried as signed ones.
TYPES = {
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "<f2": torch.float16,
    "<u2": torch.int16,
    "<f4": torch.float32,
    "<u4": torch.int32,
}
MAX_DECODED_ELEMENTS = 1 << 20
"""Weights decoded at a time (4 MB as float32): the temporaries stay in the cache."""


def multiply(x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """See `Kernels`."""
    held = hold(section, encoding, shape)
    if INPUT_SCALES in held:
        x = x * held[INPUT_SCALES].to(x.dtype)
    step = max(1, MAX_DECODED_ELEMENTS // shape[1])
    stripes = [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
    products = [torch.nn.functional.linear(x, encoding.rows(held, rows, shape).to(x.dtype)) for rows in stripes]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def decode_rows(section: Tensor, rows: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """See `Kernels`."""
    held = hold(section, encoding, shape)
    unique, inverse = torch.unique(rows, return_inverse=True)
    found = encoding.rows(held, unique, shape)
    if INPUT_SCALES in held:
        found *= held[INPUT_SCALES].float()
    return found[inverse]


def decode(section: Tensor, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> Tensor:
    """See `Kernels`."""
    return encoding.decode(part_arrays(section.numpy().data, shape, encoding), shape).to(dtype)


def hold(section: Tensor, encoding: MatrixEncoding, shape: Shape) -> dict[str, Tensor]:
    """What `encoding.rows` takes: views of the section, but for the few integers that lie across its rows."""
    parts = {
        part.name: section[part.offset_bytes : part.end_bytes].view(TYPES[part.dtype]).view(part.shape)
        for part in encoding.parts(shape)
    }
    return encoding.hold(parts, shape)
