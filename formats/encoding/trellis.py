"""`trellis` (SPEC 7.14): trellis-coded quantization, whose codes are packed by column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from formats.encoding.base import Arrays, PartShapes, Shape, Version, register
from formats.encoding.component import Component, Numbers, Planes, RowComponent
from formats.encoding.grouped import GroupedEncoding
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.trellis import TrellisLinear

MIN_MEMORY, MAX_MEMORY = 2, 9
TRELLIS_BITS = (1, 6)
"""Least and most bits of a code; the levels are twice as many as it could name."""
RUN_ROWS = 32
"""What the rows of a sequence are a multiple of: those of a word of the path."""


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Trellis(GroupedEncoding):
    """SPEC 7.14: codes of `bits` bits, one of which walks a trellis of 2**memory states down the rows of a column.

    Every `run` rows a new walk begins.
    """

    name: ClassVar[str] = "trellis"
    bit_range: ClassVar[tuple[int, int]] = TRELLIS_BITS
    memory: int
    run: int

    def _check_own(self) -> None:
        check_trellis(self.memory, self.run)

    @property
    def version(self) -> Version:
        return (1, 1)

    def unpack(self, arrays: Arrays, shape: Shape) -> TrellisLinear:
        from formats.layer.trellis import TrellisLinear

        attributes = self.composite(shape).unpack(arrays)
        return TrellisLinear(
            bits=self.bits, group_size=self.group_size, memory=self.memory, run=self.run, **attributes
        )  # fmt: skip

    def _codes(self, shape: Shape) -> RowComponent:
        return TrellisCodes(self.bits, self.memory, self.run, (shape[0], shape[1]))

    def _statistics(self, shape: Shape) -> dict[str, Component]:
        return {"scales": self._scales(shape), "levels": self._levels()}

    def _levels(self) -> Numbers:
        return Numbers("levels", "<f2", (2 << self.bits,), "a level")

    def _scaled(self, codes: Tensor, scales: Tensor, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        from formats.kernels.cpu import look_up, scale_groups

        return scale_groups(look_up(self._levels().rows(held, slice(None)), codes), scales, self.group_size)


@dataclass(slots=True, eq=False)
class TrellisCodes(RowComponent):
    """Codes [out, in], transposed: planes of path bits and of the bits above them, a sequence in one row."""

    bits: int
    memory: int
    run: int
    shape: tuple[int, int]

    @property
    def _path(self) -> Planes:
        return Planes("path", 1, self.shape[::-1])

    @property
    def _upper(self) -> Planes | None:
        return Planes("codes", self.bits - 1, self.shape[::-1]) if self.bits > 1 else None

    def part_shapes(self) -> PartShapes:
        return [part for planes in self._planes() for part in planes.part_shapes()]

    def pack(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        path = self._path.pack(value.T & 1)
        return path | self._upper.pack(value.T >> 1) if self._upper else path

    def unpack(self, arrays: Arrays) -> Any:
        codes = self._path.unpack(arrays)
        if self._upper:
            codes |= self._upper.unpack(arrays) << 1
        return codes.T.copy()

    def check_values(self, arrays: Arrays) -> None:
        """Any integers of so many bits are good."""

    def check_unused_bits(self, arrays: Arrays) -> None:
        for planes in self._planes():
            planes.check_unused_bits(arrays)

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """The level of every weight, not its code: [rows of index, in] u8 < 2**(bits + 1)."""
        from formats.kernels.trellis import level_index

        path, *upper = (held[name] for name, _, _ in self.part_shapes())
        return level_index(path, upper, self.bits, self.memory, self.run, self.shape[0], index)

    def _planes(self) -> list[Planes]:
        return [self._path, self._upper] if self._upper else [self._path]


def check_trellis(memory: int, run: int) -> None:
    """Refuse a register that there is no code for, or sequences that are not whole words."""
    if not MIN_MEMORY <= memory <= MAX_MEMORY:
        raise FormatError(f"memory={brief(memory)}: must be {MIN_MEMORY} to {MAX_MEMORY} (SPEC 7.14)")
    if run < RUN_ROWS or run % RUN_ROWS:
        raise FormatError(f"run={brief(run)}: must be a multiple of {RUN_ROWS}, above 0 (SPEC 7.14)")
