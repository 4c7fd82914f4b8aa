"""`uniform` (SPEC 7.3): equal steps, a scale and a zero per row and group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from formats.encoding.base import Arrays, Shape, Version, register
from formats.encoding.component import Component, Planes, RowComponent
from formats.encoding.grouped import GroupedEncoding
from formats.encoding.statistics import TwoLevelParts

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.uniform import QuantizedLinear


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(GroupedEncoding):
    """SPEC 7.3: codes of `bits` bits with a scale, and a zero unless symmetric, per row and group of inputs.

    With `input_scales`, a factor for every input besides; with `stat_bits`, scales and zeros in two levels.
    """

    name: ClassVar[str] = "uniform"
    symmetric: bool

    @property
    def version(self) -> Version:
        return (1, 1) if self.stat_bits or self.outliers else (1, 0)

    def unpack(self, arrays: Arrays, shape: Shape) -> QuantizedLinear:
        from formats.layer.uniform import QuantizedLinear

        attributes = {"zeros": None} | self.composite(shape).unpack(arrays)
        return QuantizedLinear(bits=self.bits, group_size=self.group_size, **attributes)

    def _statistics(self, shape: Shape) -> dict[str, Component]:
        found: dict[str, Component] = {"scales": self._scales(shape)}
        return found if self.symmetric else found | {"zeros": self._zeros(shape)}

    def _zeros(self, shape: Shape) -> RowComponent:
        groups = self.groups(shape)
        if self.stat_bits:
            return TwoLevelParts("zero", groups, self.stat_bits, self.stat_rows)
        return Planes("zeros", self.bits, groups, flat=True)

    def _scaled(self, codes: Tensor, scales: Tensor, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        from formats.kernels.cpu import decode_uniform

        zeros = float(1 << (self.bits - 1)) if self.symmetric else self._zeros(shape).rows(held, index).float()
        return decode_uniform(codes, zeros, scales, self.group_size)
