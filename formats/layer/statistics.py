"""Scales and zeros that are themselves quantized, and the values they stand for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from formats.encoding.planes import MAX_BITS, MIN_BITS
from formats.encoding.statistics import ABSMAX_BLOCK
from formats.errors import FormatError
from formats.layer.base import F16, F32, U8, decode
from formats.layer.checks import check_array, check_bits, check_finite, check_range


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TwoLevel:
    """SPEC 7.9: a statistic of every row and group in `bits` bits, as SpQR has it (arXiv 2306.03078, section 4.2).

    codes:  [out, G] u8 < 2**bits
    scales: [R, G] f16, finite; R = ceil(out / rows), the last set of rows may be short
    zeros:  [R, G] f16, finite
    """

    codes: U8
    scales: F16
    zeros: F16
    bits: int
    rows: int

    def __post_init__(self) -> None:
        check_bits(self.bits, (MIN_BITS, MAX_BITS), "stat_bits", "7.9")
        if self.rows < 1:
            raise FormatError(f"stat_rows={self.rows}: must be 1 or more (SPEC 7.9)")
        check_array("codes of a statistic", self.codes, np.uint8, _matrix(self.codes), "7.9")
        check_range("codes of a statistic", self.codes, self.bits)
        sets = (-(-self.shape[0] // self.rows), self.shape[1])
        for name, values in (("scales", self.scales), ("zeros", self.zeros)):
            check_array(f"{name} of a statistic", values, np.float16, sets, "7.9")
            check_finite(f"a {name[:-1]} of a statistic", values)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, G]"""
        return self.codes.shape

    def values(self) -> F32:
        """What the codes stand for.  -> [out, G] f32"""
        sets = np.arange(self.shape[0]) // self.rows
        scales, zeros = self.scales.astype(np.float32)[sets], self.zeros.astype(np.float32)[sets]
        return decode(self.codes.astype(np.float32), scales, zeros)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DoubleQuant:
    """SPEC 7.12: scales as QLoRA's double quantization has them (arXiv 2305.14314, section 3).

    codes:  [out, G] u8, indices of `dynamic_map`
    absmax: [ceil(out * G / 256)] f32, finite, at most 2**64 in magnitude: one for 256 codes in row-major order
    mean:   [1] f32, the same: what was subtracted before
    """

    codes: U8
    absmax: F32
    mean: F32

    def __post_init__(self) -> None:
        check_array("codes of the scales", self.codes, np.uint8, _matrix(self.codes), "7.12")
        blocks = -(-self.codes.size // ABSMAX_BLOCK)
        check_array("absmax of the scales", self.absmax, np.float32, (blocks,), "7.12")
        check_array("mean of the scales", self.mean, np.float32, (1,), "7.12")
        check_finite("an absmax of the scales", self.absmax)
        check_finite("the mean of the scales", self.mean)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, G]"""
        return self.codes.shape

    def values(self) -> F32:
        """What the codes stand for.  -> [out, G] f32"""
        blocks = (np.arange(self.codes.size) // ABSMAX_BLOCK).reshape(self.shape)
        return dynamic_map()[self.codes] * self.absmax[blocks] + self.mean


Statistic: TypeAlias = F16 | TwoLevel | DoubleQuant
"""Scales [out, G]: as they are, or quantized."""


def statistic_values(statistic: npt.NDArray[np.generic] | TwoLevel | DoubleQuant) -> F32:
    """What a statistic stands for.  -> [out, G] f32"""
    return statistic.astype(np.float32) if isinstance(statistic, np.ndarray) else statistic.values()


@functools.cache
def dynamic_map() -> F32:
    """The dynamic 8-bit type (SPEC 7.12.2; arXiv 1511.04561): an exponent in unary, the other bits a fraction.

    Decade i has 2**i midpoints of equal parts of [0.1, 1] times 10**(i - 6), and their negatives.  -> [256] f32, rising
    """
    values = [0.0, 1.0]
    for i in range(7):
        for j in range(2**i):
            # Integers, whose quotient is rounded once: 0.1 and 0.9 would each bring an error of their own.
            midpoint = (2 ** (i + 1) + 9 * (2 * j + 1)) / (10 ** (7 - i) * 2 ** (i + 1))
            values += [midpoint, -midpoint]
    table = np.sort(np.array(values, np.float32))
    table.setflags(write=False)  # every caller gets the same one
    return table


def _matrix(codes: U8) -> tuple[int, ...]:
    """The shape that `codes` must have: its own, if it is one of a matrix that is not empty."""
    if codes.ndim != 2 or codes.size == 0:
        raise FormatError(f"codes of a statistic {list(codes.shape)}: must be [out, G], not empty (SPEC 7.9, 7.12)")
    return codes.shape
