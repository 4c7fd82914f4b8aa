"""What `uniform`, `codebook` and `trellis` share: a scale per row and group of inputs, and sparse outliers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from formats.encoding.base import Description, Shape
from formats.encoding.component import Component, InputScales, Numbers, Planes, RowComponent
from formats.encoding.matrix import INPUT_SCALES, MatrixEncoding
from formats.encoding.outliers import OutlierParts
from formats.encoding.planes import MAX_BITS, MIN_BITS
from formats.encoding.statistics import TwoLevelParts
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedEncoding(MatrixEncoding):
    """Their fields: SPEC 7.3, two-level statistics (`stat_*`, SPEC 7.9) and sparse outliers (SPEC 7.10)."""

    bit_range: ClassVar[tuple[int, int]] = (MIN_BITS, MAX_BITS)
    bits: int
    group_size: int
    input_scales: bool = False
    stat_bits: int = 0  # 0: scales and zeros are stored as they are
    stat_rows: int = 0
    outliers: int = 0  # how many there are

    def __post_init__(self) -> None:
        least, most = self.bit_range
        if not least <= self.bits <= most:
            raise FormatError(f"bits={brief(self.bits)}: must be {least} to {most} (SPEC 7.3, 7.14)")
        if self.group_size < 1:
            raise FormatError(f"group_size={brief(self.group_size)}: must be 1 or more (SPEC 7.3)")
        if self.stat_bits != 0 and not MIN_BITS <= self.stat_bits <= MAX_BITS:
            raise FormatError(f"stat_bits={brief(self.stat_bits)}: must be 0 or {MIN_BITS} to {MAX_BITS} (SPEC 7.9)")
        if self.stat_rows < 1 if self.stat_bits else self.stat_rows != 0:
            wanted = "1 or more with stat_bits" if self.stat_bits else "0 without stat_bits"
            raise FormatError(f"stat_rows={brief(self.stat_rows)}: must be {wanted} (SPEC 7.9)")
        self._check_own()

    def _check_own(self) -> None:
        """Refuse what the fields of a subclass cannot be."""

    def components(self, shape: Shape) -> Mapping[str, Component]:
        if self.group_size > shape[1]:
            raise FormatError(f"group_size={brief(self.group_size)}: more than {shape[1]} inputs (SPEC 7.3)")
        found: dict[str, Component] = {"codes": self._codes(shape)} | self._statistics(shape)
        if self.input_scales:
            found[INPUT_SCALES] = InputScales(INPUT_SCALES, "<f2", (shape[1],), "an input scale")
        found |= self._order(shape)
        if self.outliers:
            found["outliers"] = OutlierParts(shape, self.outliers)
        return found

    def _codes(self, shape: Shape) -> RowComponent:
        return Planes("codes", self.bits, (shape[0], shape[1]))

    def _statistics(self, shape: Shape) -> dict[str, Component]:
        """What stands behind the codes."""
        return {"scales": self._scales(shape)}

    def _order(self, shape: Shape) -> dict[str, Component]:
        """What stands behind all but outliers."""
        return {}

    def _scales(self, shape: Shape) -> RowComponent:
        groups = self.groups(shape)
        if self.stat_bits:
            return TwoLevelParts("scale", groups, self.stat_bits, self.stat_rows)
        return Numbers("scales", "<f2", groups, "a scale")

    def groups(self, shape: Shape) -> tuple[int, int]:
        """[out, G]"""
        return shape[0], -(-shape[1] // self.group_size)

    def describe(self, shape: Shape) -> Description:
        return Description(self.bits, self.group_size, self.outliers)

    def rows(self, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        codes = self._codes(shape).rows(held, index)[:, : shape[1]]
        weight = self._scaled(codes, self._scales(shape).rows(held, index), held, index, shape)
        if self.outliers:
            OutlierParts(shape, self.outliers).add_to(weight, held, index)
        return weight

    @abstractmethod
    def _scaled(self, codes: Tensor, scales: Tensor, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        """scale * unit.  codes: [n, in] u8, scales: [n, G] f32 -> [n, in] f32"""
