"""`codebook` (SPEC 7.11): codes are indices of a table of levels, NF4, FP4 or one fitted to the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from formats.encoding.base import Arrays, Shape, Version, register
from formats.encoding.component import Component, Numbers, RowComponent
from formats.encoding.grouped import GroupedEncoding
from formats.encoding.statistics import DoubleQuantParts
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.codebook import CodebookLinear

FITTED = "fitted"
TABLE_BITS = {"nf4": 4, "fp4": 4}
"""Bits of the codes of each table that is not stored."""


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Codebook(GroupedEncoding):
    """SPEC 7.11: codes of `bits` bits, a level for each, and a scale per row and group of inputs.

    levels: "nf4", "fp4", or "fitted", which stores them. With `double_quant`, scales as in QLoRA (SPEC 7.12).
    """

    name: ClassVar[str] = "codebook"
    levels: str
    double_quant: bool = False

    def _check_own(self) -> None:
        check_levels(self.levels, self.bits)
        if self.double_quant and self.stat_bits:
            raise FormatError("double_quant=True: must be False with stat_bits (SPEC 7.12)")

    @property
    def version(self) -> Version:
        return (1, 1)

    def unpack(self, arrays: Arrays, shape: Shape) -> CodebookLinear:
        from formats.layer.codebook import CodebookLinear

        attributes = {"levels": self.levels} | self.composite(shape).unpack(arrays)
        return CodebookLinear(bits=self.bits, group_size=self.group_size, **attributes)

    def _statistics(self, shape: Shape) -> dict[str, Component]:
        found: dict[str, Component] = {"levels": self._levels()} if self.levels == FITTED else {}
        return found | {"scales": self._scales(shape)}

    def _scales(self, shape: Shape) -> RowComponent:
        if self.double_quant:
            return DoubleQuantParts(self.groups(shape))
        return GroupedEncoding._scales(self, shape)  # super() finds no class that has slots from its dataclass

    def _levels(self) -> Numbers:
        return Numbers("levels", "<f2", (1 << self.bits,), "a level")

    def _scaled(self, codes: Tensor, scales: Tensor, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        import torch

        from formats.kernels.cpu import look_up, scale_groups
        from formats.layer.codebook import level_table

        if self.levels == FITTED:
            levels = self._levels().rows(held, slice(None))
        else:
            levels = torch.tensor(level_table(self.levels))
        return scale_groups(look_up(levels, codes), scales, self.group_size)


def check_levels(levels: str, bits: int) -> None:
    """Refuse a table that is not known, or codes that do not fit it."""
    if levels != FITTED and levels not in TABLE_BITS:
        raise FormatError(f"levels={brief(levels)}: must be {', '.join(TABLE_BITS)} or {FITTED} (SPEC 7.11)")
    if bits != TABLE_BITS.get(levels, bits):
        raise FormatError(f"bits={brief(bits)}: must be {TABLE_BITS[levels]} with levels {levels} (SPEC 7.11)")
