"""Super-blocks of 256 weights: Q2_K to Q6_K. Scales of 16 or 32 weights are integers, d and d_min make them numbers.

A weight is d * scale * code - d_min * minimum, or d * scale * code where codes and scales have signs; in float32,
products first. They are exact, so that only the difference rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from formats.ggml.blocks import F16, F32, U8, as_bytes, as_f16
from formats.ggml.types import K_FORMS, SUPER_BLOCK, TYPES, KForm


@dataclass(frozen=True, slots=True, eq=False)
class KBlocks:
    """Numbers without signs: one of `bits` bits that has one is stored with 2**(bits - 1) added.

    codes: [rows, in] u8; scales, minima: [rows, groups] u8; d, d_min: [rows, in / 256] f16; minima and d_min are None
    where codes have signs
    """

    kind: str
    codes: U8
    scales: U8
    d: F16
    minima: U8 | None = None
    d_min: F16 | None = None

    @property
    def form(self) -> KForm:
        return K_FORMS[self.kind]

    def values(self) -> F32:
        """The weight, in the order of operations of ggml.  -> [rows, in] f32"""
        form, shape = self.form, (*self.d.shape, self.form.n_groups)
        codes, scales = self.codes.astype(np.float32), self.scales.astype(np.float32)
        if not form.has_min:
            codes -= 1 << (form.bits - 1)
            scales -= 1 << (form.stat_bits - 1)
        steps = self.d.astype(np.float32)[..., None] * scales.reshape(shape)
        values = steps[..., None] * codes.reshape(*shape, form.group)
        if self.minima is not None and self.d_min is not None:
            values -= (self.d_min.astype(np.float32)[..., None] * self.minima.reshape(shape))[..., None]
        return values.reshape(self.codes.shape)

    def pack(self) -> U8:
        """The rows of the tensor.  -> [rows, bytes] u8"""
        shape = self.d.shape
        codes, scales = self.codes.reshape(*shape, SUPER_BLOCK), self.scales.reshape(*shape, -1)
        ends = [as_bytes(self.d)]
        if self.minima is not None and self.d_min is not None:
            ends.append(as_bytes(self.d_min))
            minima = self.minima.reshape(*shape, -1)
            if self.kind == "Q2_K":
                parts = [scales | minima << 4, _pack_quarters(codes), *ends]
            else:
                high = [_pack_bits(codes >> 4)] if self.kind == "Q5_K" else []
                parts = [*ends, _pack_pairs(scales, minima), *high, _pack_nibbles(codes & 15, 32)]
        elif self.kind == "Q3_K":
            parts = [_pack_bits(codes >> 2), _pack_quarters(codes & 3), _pack_sixes(scales), *ends]
        else:
            signed = scales ^ np.uint8(0x80)  # to two's complement
            parts = [_pack_nibbles(codes & 15, 64), _pack_quarters(codes >> 4), signed, *ends]
        return np.concatenate(parts, axis=-1).reshape(shape[0], -1)


def unpack_k(kind: str, rows: U8) -> KBlocks:
    """The super-blocks in the rows [rows, bytes] u8 of a tensor."""
    raw = rows.reshape(len(rows), -1, TYPES[kind].n_bytes)
    codes: U8
    scales: U8
    minima: U8 | None = None
    d_min: U8 | None = None
    if kind == "Q2_K":
        stats, quarters, d, d_min = _cut(raw, 16, 64, 2, 2)
        codes, scales, minima = _unpack_quarters(quarters), stats & 15, stats >> 4
    elif kind == "Q3_K":
        high, quarters, stats, d = _cut(raw, 32, 64, 12, 2)
        codes, scales = _unpack_quarters(quarters) | _unpack_bits(high) << 2, _unpack_sixes(stats)
    elif kind == "Q4_K":
        d, d_min, stats, low = _cut(raw, 2, 2, 12, 128)
        codes, (scales, minima) = _unpack_nibbles(low, 32), _unpack_pairs(stats)
    elif kind == "Q5_K":
        d, d_min, stats, high, low = _cut(raw, 2, 2, 12, 32, 128)
        codes, (scales, minima) = _unpack_nibbles(low, 32) | _unpack_bits(high) << 4, _unpack_pairs(stats)
    else:
        low, quarters, signed, d = _cut(raw, 128, 64, 16, 2)
        codes, scales = _unpack_nibbles(low, 64) | _unpack_quarters(quarters) << 4, signed ^ np.uint8(0x80)
    codes, scales = codes.reshape(len(rows), -1), scales.reshape(len(rows), -1)
    if minima is None or d_min is None:
        return KBlocks(kind, codes, scales, as_f16(d))
    return KBlocks(kind, codes, scales, as_f16(d), minima.reshape(len(rows), -1), as_f16(d_min))


def _cut(raw: U8, *sizes: int) -> list[U8]:
    """Fields of a block [..., bytes], one behind the other."""
    return np.split(raw, np.cumsum(sizes)[:-1], axis=-1)


def _pack_nibbles(codes: U8, width: int) -> U8:
    """[..., 256] of 4 bits -> [..., 128]: of every 2 * width codes, the second half lies above the first."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2, width)
    packed: U8 = pairs[..., 0, :] | pairs[..., 1, :] << 4
    return packed.reshape(*codes.shape[:-1], -1)


def _unpack_nibbles(packed: U8, width: int) -> U8:
    halves = packed.reshape(*packed.shape[:-1], -1, 1, width)
    return np.concatenate([halves & 15, halves >> 4], axis=-2).reshape(*packed.shape[:-1], -1)


def _pack_quarters(codes: U8) -> U8:
    """[..., 256] of 2 bits -> [..., 64]: of every 128 codes, four runs of 32 lie one above the other."""
    runs = codes.reshape(*codes.shape[:-1], 2, 4, 32)
    packed: U8 = runs[..., 0, :] | runs[..., 1, :] << 2 | runs[..., 2, :] << 4 | runs[..., 3, :] << 6
    return packed.reshape(*codes.shape[:-1], 64)


def _unpack_quarters(packed: U8) -> U8:
    halves = packed.reshape(*packed.shape[:-1], 2, 1, 32)
    return (halves >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(*packed.shape[:-1], SUPER_BLOCK)


def _pack_bits(bits: U8) -> U8:
    """[..., 256] of 1 bit -> [..., 32]: eight runs of 32 lie one above the other."""
    packed: U8 = np.packbits(bits.reshape(*bits.shape[:-1], 8, 32), axis=-2, bitorder="little")
    return packed[..., 0, :]


def _unpack_bits(packed: U8) -> U8:
    runs = np.unpackbits(packed[..., None, :], axis=-2, bitorder="little")
    return runs.reshape(*packed.shape[:-1], SUPER_BLOCK)


def _pack_sixes(stats: U8) -> U8:
    """[..., 16] of 6 bits -> [..., 12]: nibbles in pairs, then the upper bits of every fourth."""
    low, high = stats & 15, (stats >> 4).reshape(*stats.shape[:-1], 4, 4)
    upper = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return np.concatenate([low[..., :8] | low[..., 8:] << 4, upper], axis=-1)


def _unpack_sixes(packed: U8) -> U8:
    low = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    upper = packed[..., None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    stats: U8 = low | upper.reshape(low.shape) << 4
    return stats


def _pack_pairs(scales: U8, minima: U8) -> U8:
    """Twice [..., 8] of 6 bits -> [..., 12]: the upper two bits of the last four lie above the first four."""
    first = [stats[..., :4] | stats[..., 4:] >> 4 << 6 for stats in (scales, minima)]
    return np.concatenate([*first, scales[..., 4:] & 15 | minima[..., 4:] << 4], axis=-1)


def _unpack_pairs(packed: U8) -> tuple[U8, U8]:
    last = packed[..., 8:]
    scales = np.concatenate([packed[..., :4] & 63, last & 15 | packed[..., :4] >> 6 << 4], axis=-1)
    minima = np.concatenate([packed[..., 4:8] & 63, last >> 4 | packed[..., 4:8] >> 6 << 4], axis=-1)
    return scales, minima
