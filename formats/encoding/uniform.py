"""`uniform` (SPEC 7.3): equal steps, a scale and a zero per row and group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from formats.encoding.base import Arrays, Shape, Version, register
from formats.encoding.component import Component, Plain, Planes, RowComponent
from formats.encoding.grouped import GroupedEncoding
from formats.encoding.statistics import TwoLevelParts

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.uniform import QuantizedLinear

INPUT_ORDER = "input_order"


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(GroupedEncoding):
    """SPEC 7.3: codes of `bits` bits with a scale, and a zero unless symmetric, per row and group of inputs.

    With `input_scales`, a factor for every input besides; with `stat_bits`, scales and zeros in two levels; with
    `input_order`, inputs of a group are not neighbours (SPEC 7.8).
    """

    name: ClassVar[str] = "uniform"
    symmetric: bool
    input_order: bool = False

    @property
    def version(self) -> Version:
        if self.input_order:
            return (1, 3)
        return (1, 1) if self.stat_bits or self.outliers else (1, 0)

    def _order(self, shape: Shape) -> dict[str, Component]:
        return {INPUT_ORDER: InputOrder(INPUT_ORDER, "<u4", (shape[1],))} if self.input_order else {}

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
        if not self.input_order:
            return decode_uniform(codes, zeros, scales, self.group_size)
        places = held[INPUT_ORDER].long()
        return decode_uniform(codes[:, places.argsort()], zeros, scales, self.group_size)[:, places]


@dataclass(slots=True, eq=False)
class InputOrder(Plain):
    """The place of every input among them all, by which groups are counted (SPEC 7.8)."""

    def check_values(self, arrays: Arrays) -> None:
        from formats.layer.checks import check_permutation

        check_permutation(self.name, arrays[self.name])
