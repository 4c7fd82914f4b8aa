"""A quantized linear layer whose codes are indices of a table (SPEC 7.11)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from formats.encoding.codebook import FITTED, Codebook, check_levels
from formats.layer.base import F16, F32
from formats.layer.checks import check_array, check_finite
from formats.layer.grouped import GroupedLayer
from formats.layer.statistics import DoubleQuant

# QLoRA's NormalFloat (arXiv 2305.14314, appendix E): quantiles of the normal distribution, and an exact zero.
_NF4_NEGATIVE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022833234, -0.09105003625154495),
)
_NF4_POSITIVE = (
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434),
    *(0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_TWELFTHS = (1 / 16, 8, 12, 4, 6, 2, 3)  # codes 1 to 7; in the order of their bits, which is that of bitsandbytes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class CodebookLinear(GroupedLayer):
    """A weight [out, in]: a scale per row and group of inputs, times the level of the code; the rest as `GroupedLayer`.

    levels: "nf4" or "fp4" (both 4 bits), or fitted ones: [2**bits] f16, finite, in any order
    scales: [out, G] f16, TwoLevel or DoubleQuant
    """

    levels: str | F16

    def _check_own(self) -> None:
        check_levels(self._levels_name, self.bits)
        if isinstance(self.levels, np.ndarray):
            check_array("levels", self.levels, np.float16, (1 << self.bits,), "7.11")
            check_finite("a level", self.levels)

    @property
    def _levels_name(self) -> str:
        return self.levels if isinstance(self.levels, str) else FITTED

    @property
    def encoding(self) -> Codebook:
        double_quant = isinstance(self.scales, DoubleQuant)
        return Codebook(levels=self._levels_name, double_quant=double_quant, **self._common_fields())

    def level_values(self) -> F32:
        """The level of every code.  -> [2**bits] f32"""
        return level_table(self.levels) if isinstance(self.levels, str) else self.levels.astype(np.float32)

    def dequantize(self) -> F32:
        return self._finished(self._per_weight(self.scales) * self.level_values()[self.codes])


@functools.cache
def level_table(name: str) -> F32:
    """The levels of "nf4" or "fp4" in the order of their codes (SPEC 7.11.2, 7.11.3).  -> [16] f32"""
    twelfths = [k / 12 for k in _FP4_TWELFTHS]
    levels = {
        "nf4": (*_NF4_NEGATIVE, 0.0, *_NF4_POSITIVE),
        "fp4": (0.0, *twelfths, 0.0, *(-level for level in twelfths)),
    }
    table = np.array(levels[name], np.float32)
    table.setflags(write=False)  # every caller gets the same one
    return table
