"""A quantized linear layer whose codes walk a trellis (SPEC 7.14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formats.encoding.trellis import TRELLIS_BITS, Trellis, check_trellis
from formats.errors import FormatError
from formats.layer.base import F16, F32
from formats.layer.checks import check_array, check_finite
from formats.layer.grouped import GroupedLayer
from formats.layer.statistics import DoubleQuant
from formats.trellis import U8, subsets


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TrellisLinear(GroupedLayer):
    """A weight [out, in]: a scale per row and group of inputs, times a level; the rest as `GroupedLayer`.

    codes:  [out, in] u8 < 2**bits, bits 1 to 6: bit 0 is the path bit, those above choose within a subset of levels
    levels: [2**(bits + 1)] f16, finite: level 4 * choice + subset
    memory: 2 to 9: the path bits of so many rows above count besides a row's own
    run:    rows of a column that form one walk, a multiple of 32; the last may be short
    scales: [out, G] f16 or TwoLevel
    """

    bit_range: ClassVar[tuple[int, int]] = TRELLIS_BITS
    levels: F16
    memory: int
    run: int

    def _check_own(self) -> None:
        check_trellis(self.memory, self.run)
        if isinstance(self.scales, DoubleQuant):
            raise FormatError("scales are quantized twice: trellis has them as f16 or in two levels (SPEC 7.14)")
        check_array("levels", self.levels, np.float16, (2 << self.bits,), "7.14")
        check_finite("a level", self.levels)

    @property
    def encoding(self) -> Trellis:
        return Trellis(memory=self.memory, run=self.run, **self._common_fields())

    def level_index(self) -> U8:
        """The level of every weight.  -> [out, in] u8 < 2**(bits + 1)"""
        return subsets(self.codes & np.uint8(1), self.memory, self.run) + 4 * (self.codes >> 1)

    def dequantize(self) -> F32:
        return self._finished(self._per_weight(self.scales) * self.levels.astype(np.float32)[self.level_index()])
