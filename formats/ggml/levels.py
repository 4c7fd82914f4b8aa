"""Blocks of 32 weights whose codes are numbers of levels: IQ4_NL and MXFP4. A weight is d * level, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from formats.ggml.blocks import F16, F32, U8, as_bytes, as_f16, pack_nibbles, unpack_nibbles
from formats.ggml.types import BLOCK

_FP4 = (0, 1, 2, 3, 4, 6, 8, 12)
LEVELS = {
    "IQ4_NL": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "MXFP4": (*_FP4, *(-level for level in _FP4)),
}
EXPONENT_BIAS = 128
"""Of the power of two that scales a block of MXFP4, whose levels are twice those of its definition."""


@dataclass(frozen=True, slots=True, eq=False)
class LevelBlocks:
    """codes: [rows, in] u8 < 16; d: [rows, in / 32] f16"""

    kind: str
    codes: U8
    d: F16

    def values(self) -> F32:
        """The weight.  -> [rows, in] f32"""
        levels = np.array(LEVELS[self.kind], np.float32)[self.codes]
        values: F32 = self.d.astype(np.float32)[..., None] * levels.reshape(*self.d.shape, BLOCK)
        return values.reshape(self.codes.shape)

    def pack(self) -> U8:
        """The rows of a tensor of IQ4_NL.  -> [rows, bytes] u8"""
        nibbles = pack_nibbles(self.codes.reshape(*self.d.shape, BLOCK))
        return np.concatenate([as_bytes(self.d), nibbles], axis=-1).reshape(len(self.codes), -1)


def unpack_levels(kind: str, rows: U8) -> LevelBlocks | None:
    """The blocks in the rows [rows, bytes] u8 of a tensor; None where a scale of MXFP4 does not fit 16 bits."""
    n_scale = 2 if kind == "IQ4_NL" else 1
    blocks = rows.reshape(len(rows), -1, n_scale + BLOCK // 2)
    if kind == "IQ4_NL":
        d = as_f16(blocks[..., :2])
    else:
        exponents = blocks[..., 0].astype(np.int32) - EXPONENT_BIAS
        if exponents.min() < -24 or exponents.max() > 15:
            return None
        d = np.ldexp(np.float32(1), exponents).astype(np.float16)
    return LevelBlocks(kind, unpack_nibbles(blocks[..., n_scale:]).reshape(len(rows), -1), d)
