"""A quantized linear layer in equal steps (SPEC 7.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from formats.encoding.uniform import Uniform
from formats.errors import FormatError
from formats.layer.base import F32, U8, decode, group_index
from formats.layer.checks import check_array, check_permutation, check_range
from formats.layer.grouped import GroupedLayer
from formats.layer.statistics import DoubleQuant, TwoLevel


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedLinear(GroupedLayer):
    """A weight [out, in] as codes with one (scale, zero) per row and group of inputs; the rest as `GroupedLayer`.

    scales: [out, G] f16 or TwoLevel
    zeros:  [out, G] u8 < 2**bits, or TwoLevel as the scales are; None when symmetric: 2**(bits - 1) everywhere
    input_order: [in] u32, the place of each input, each once: groups are counted by it; None: as inputs stand
    """

    zeros: U8 | TwoLevel | None
    input_order: npt.NDArray[np.uint32] | None = None

    def _check_own(self) -> None:
        if isinstance(self.scales, DoubleQuant):
            raise FormatError("scales are quantized twice: uniform has them as f16 or in two levels (SPEC 7.3)")
        if self.input_order is not None:
            check_array("input_order", self.input_order, np.uint32, (self.in_features,), "7.8")
            check_permutation("input_order", self.input_order)
        if isinstance(self.zeros, np.ndarray):
            check_array("zeros", self.zeros, np.uint8, self.groups)
            check_range("zeros", self.zeros, self.bits)
        elif self.zeros is not None:
            self._check_groups("zeros", self.zeros.shape)
        if self.zeros is not None and _levels(self.scales) != _levels(self.zeros):
            one, other = _levels(self.scales), _levels(self.zeros)
            raise FormatError(f"scales are {one}, zeros {other}: must be stored alike (SPEC 7.9)")

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def encoding(self) -> Uniform:
        has_order = self.input_order is not None
        return Uniform(symmetric=self.symmetric, input_order=has_order, **self._common_fields())

    def groups_of_inputs(self) -> npt.NDArray[np.int64]:
        if self.input_order is None:
            return group_index(self.in_features, self.group_size)
        return self.input_order.astype(np.int64) // self.group_size

    def dequantize(self) -> F32:
        zeros = np.full(self.groups, 1 << (self.bits - 1), np.uint8) if self.zeros is None else self.zeros
        codes = self.codes.astype(np.float32)
        return self._finished(decode(codes, self._per_weight(self.scales), self._per_weight(zeros)))


def _levels(statistic: object) -> str:
    """How a statistic is stored, in words."""
    if isinstance(statistic, TwoLevel):
        return f"in two levels of {statistic.bits} bits over {statistic.rows} rows"
    return "in one level"
