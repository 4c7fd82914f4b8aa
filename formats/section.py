"""The bytes of a section (SPEC 7): packing, unpacking, and what a hash cannot tell."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.encoding import Data, Dense, Encoding, MatrixEncoding, Shape, encoding_of
from formats.errors import FormatError
from formats.layer import Layer


def part_arrays(data: Data, shape: Shape, encoding: Encoding) -> dict[str, npt.NDArray[Any]]:
    """The parts of a section by name, as views of `data`: no copy."""
    if len(data) != encoding.section_bytes(shape):
        raise FormatError(f"{len(data)} bytes, must be {encoding.section_bytes(shape)} (SPEC 5.4)")
    return {
        part.name: np.frombuffer(data, part.dtype, math.prod(part.shape), part.offset_bytes).reshape(part.shape)
        for part in encoding.parts(shape)
    }


def pack(layer: Layer) -> bytes:
    """The section of a layer under `encoding_of(layer)`; `unpack` returns the same layer, bit for bit."""
    encoding = encoding_of(layer)
    values = encoding.pack(layer)
    section = bytearray(encoding.section_bytes(layer.shape))
    for name, array in part_arrays(section, layer.shape, encoding).items():
        array[...] = values[name]
    return bytes(section)


def unpack(data: Data, shape: Shape, encoding: MatrixEncoding) -> Layer:
    """The layer of a section; its arrays are copies and outlive `data`."""
    arrays = part_arrays(data, shape, encoding)
    encoding.check_values(arrays, shape)
    return encoding.unpack(arrays, shape)


def dense_to_float32(data: Data, shape: Shape, dtype: str) -> npt.NDArray[np.float32]:
    """The values of a `dense` section as float32, exact for every stored type.  -> `shape` f32, a copy"""
    return widened(part_arrays(data, shape, Dense(dtype))["values"], dtype)


def widened(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values that were stored as `dtype`, as float32; a copy."""
    if dtype == "BF16":  # a bf16 is the upper half of a float32
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)  # in place: `<<` would make a scalar of an array without dimensions
        return wide.view(np.float32)
    return raw.astype(np.float32)


def check_section(data: Data, shape: Shape, encoding: Encoding) -> None:
    """What a hash cannot tell: zero gaps, numbers that can be, zero unused bits (SPEC 4.3, 7.6, 7.4.4)."""
    arrays = part_arrays(data, shape, encoding)
    end = 0
    for part in encoding.parts(shape):
        if bytes(data[end : part.offset_bytes]).strip(b"\0"):
            raise FormatError(f"bytes before part {part.name!r} are not zero (SPEC 4.3)")
        end = part.end_bytes
    encoding.check_values(arrays, shape)
    encoding.check_unused_bits(arrays, shape)
