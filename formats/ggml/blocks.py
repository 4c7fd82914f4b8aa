"""Blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. A weight is d * (n - offset), or d * n + m, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.ggml.types import BLOCK, TYPES

U8: TypeAlias = npt.NDArray[Any]
"""Of u8; numpy's annotations do not know that its bits stay eight when they are shifted."""
F16: TypeAlias = npt.NDArray[np.float16]
F32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Form:
    """bits: of a code. has_min: a block stores what is added, else codes are centered."""

    bits: int
    has_min: bool

    @property
    def offset(self) -> int:
        """What a code is less by in the weight."""
        return 0 if self.has_min else 1 << (self.bits - 1)


FORMS = {
    "Q4_0": Form(4, False),
    "Q4_1": Form(4, True),
    "Q5_0": Form(5, False),
    "Q5_1": Form(5, True),
    "Q8_0": Form(8, False),
}


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """codes: [rows, in] u8 < 2**bits; d, m: [rows, in / 32] f16, m None where codes are centered."""

    kind: str
    codes: U8
    d: F16
    m: F16 | None = None

    @property
    def form(self) -> Form:
        return FORMS[self.kind]

    def values(self) -> F32:
        """The weight, in the order of operations of ggml.  -> [rows, in] f32"""
        codes = self.codes.reshape(*self.d.shape, BLOCK).astype(np.float32)
        d = self.d.astype(np.float32)[..., None]
        values = d * (codes - self.form.offset) if self.m is None else d * codes + self.m.astype(np.float32)[..., None]
        return values.reshape(self.codes.shape)

    def pack(self) -> U8:
        """The rows of the tensor.  -> [rows, bytes] u8"""
        codes = self.codes.reshape(*self.d.shape, BLOCK)
        parts = [as_bytes(self.d)] + ([] if self.m is None else [as_bytes(self.m)])
        if self.form.bits == 8:
            parts.append(codes - np.uint8(self.form.offset))  # wraps to two's complement
        else:
            if self.form.bits == 5:
                parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
            parts.append(pack_nibbles(codes & 15))
        return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def unpack(kind: str, rows: U8) -> Blocks:
    """The blocks in the rows [rows, bytes] u8 of a tensor."""
    form, n_bytes = FORMS[kind], TYPES[kind].n_bytes
    blocks = rows.reshape(len(rows), -1, n_bytes)
    d = as_f16(blocks[..., 0:2])
    m = as_f16(blocks[..., 2:4]) if form.has_min else None
    start = 4 if form.has_min else 2
    if form.bits == 8:
        codes = blocks[..., start:] + np.uint8(form.offset)
    else:
        codes = unpack_nibbles(blocks[..., -16:])
        if form.bits == 5:
            codes |= np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little") << 4
    return Blocks(kind, codes.reshape(len(rows), -1), d, m)


def pack_nibbles(codes: U8) -> U8:
    """[..., 32] of 4 bits -> [..., 16]: the second half lies above the first."""
    packed: U8 = codes[..., :16] | codes[..., 16:] << 4
    return packed


def unpack_nibbles(packed: U8) -> U8:
    """The way back."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def as_bytes(values: npt.NDArray[Any]) -> U8:
    """[...] f16 -> [..., 2] u8"""
    return np.ascontiguousarray(values).astype("<f2").view(np.uint8).reshape(*values.shape, 2)


def as_f16(raw: U8) -> F16:
    """[..., 2] u8 -> [...] f16"""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float16)
