"""Codes to bit planes and back (SPEC 7.4): the numpy reference that every kernel is tested against.

A little-endian word is its four bytes in order, so planes are built byte by byte and viewed as words: this
needs no temporary wider than the codes themselves.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from formats.encoding.planes import WORD_BITS, plane_widths, row_words
from formats.errors import FormatError

U8: TypeAlias = npt.NDArray[np.uint8]
U32: TypeAlias = npt.NDArray[np.uint32]


def pack_codes(codes: U8, bits: int) -> list[U32]:
    """One plane per width of `plane_widths(bits)`.

    codes: [rows, n] u8 < 2**bits  ->  [rows, row_words(n, width)] little-endian u32, unused bits zero
    """
    widths = plane_widths(bits)
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise FormatError(f"codes are {codes.dtype}{list(codes.shape)}: must be uint8 [rows, n]")
    if codes.size and int(codes.max()) >= 1 << bits:
        raise FormatError(f"code {int(codes.max())} does not fit {bits} bits (SPEC 7.4.1)")
    planes, low_bit = [], 0
    for width in widths:
        planes.append(_pack_plane((codes >> np.uint8(low_bit)) & np.uint8((1 << width) - 1), width))
        low_bit += width
    return planes


def unpack_codes(planes: Sequence[U32], bits: int, n: int) -> U8:
    """The codes of `pack_codes`.

    planes: one [rows, row_words(n, width)] u32 per width  ->  [rows, n] u8
    """
    widths = plane_widths(bits)
    shapes = [plane.shape for plane in planes]
    rows = shapes[0][0] if shapes else 0
    if shapes != [(rows, row_words(n, width)) for width in widths]:
        raise FormatError(f"planes {shapes} do not hold {n} codes of {bits} bits a row (SPEC 7.4.2)")
    codes, low_bit = np.zeros((rows, n), np.uint8), 0
    for plane, width in zip(planes, widths, strict=True):
        codes |= _unpack_plane(plane, width, n) << low_bit
        low_bit += width
    return codes


def has_unused_bits(plane: U32, width: int, n: int) -> bool:
    """Whether a bit behind the last field of some row is set (SPEC 7.4.4).  plane: [rows, words] u32"""
    used = n * width - WORD_BITS * (plane.shape[1] - 1)
    return used < WORD_BITS and bool((plane[:, -1] >> np.uint32(used)).any())


def _pack_plane(fields: U8, width: int) -> U32:
    rows, n = fields.shape
    per_byte, row_bytes = 8 // width, 4 * row_words(n, width)
    padded = np.zeros((rows, row_bytes * per_byte), np.uint8)
    padded[:, :n] = fields
    lanes = padded.reshape(rows, row_bytes, per_byte)
    packed = np.zeros((rows, row_bytes), np.uint8)
    for lane in range(per_byte):
        packed |= lanes[:, :, lane] << (lane * width)
    return packed.view("<u4")


def _unpack_plane(plane: U32, width: int, n: int) -> U8:
    packed = np.ascontiguousarray(plane, "<u4").view(np.uint8)  # [rows, row_bytes]
    per_byte = 8 // width
    lanes = np.empty((*packed.shape, per_byte), np.uint8)
    for lane in range(per_byte):
        lanes[:, :, lane] = (packed >> (lane * width)) & np.uint8((1 << width) - 1)
    return lanes.reshape(len(packed), -1)[:, :n]
