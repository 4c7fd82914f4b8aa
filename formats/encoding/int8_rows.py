"""`int8_rows` (SPEC 7.13): LLM.int8()'s weights, a scale per row and a few inputs in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from formats.encoding.base import Arrays, Description, Shape, Version, register
from formats.encoding.component import Component, Numbers, Plain
from formats.encoding.matrix import MatrixEncoding
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.int8 import Int8Linear


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Rows(MatrixEncoding):
    """SPEC 7.13: signed bytes with an fp32 scale per row; `columns` inputs have values of 16 bits instead."""

    name: ClassVar[str] = "int8_rows"
    columns: int = 0

    @property
    def version(self) -> Version:
        return (1, 1)

    def components(self, shape: Shape) -> Mapping[str, Component]:
        out_features, in_features = shape
        if not 0 <= self.columns <= in_features:
            raise FormatError(f"columns={brief(self.columns)}: must be 0 to {in_features} (SPEC 7.13)")
        found: dict[str, Component] = {
            "codes": Plain("codes", "|i1", (out_features, in_features)),
            "scales": Numbers("scales", "<f4", (out_features,), "a scale"),
        }
        if self.columns:
            found["columns"] = Plain("columns", "<u4", (self.columns,))
            found["values"] = Numbers("values", "<f2", (out_features, self.columns), "a value")
        return found

    def describe(self, shape: Shape) -> Description:
        return Description(8, None, self.columns * shape[0])

    def check_values(self, arrays: Arrays, shape: Shape) -> None:
        from formats.layer.int8 import check_codes_and_columns

        MatrixEncoding.check_values(self, arrays, shape)  # super() finds no class that has slots from its dataclass
        check_codes_and_columns(arrays["codes"], arrays.get("columns"))

    def unpack(self, arrays: Arrays, shape: Shape) -> Int8Linear:
        from formats.layer.int8 import Int8Linear

        return Int8Linear(**self.composite(shape).unpack(arrays))

    def rows(self, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        from formats.kernels.cpu import unsigned

        weight = held["codes"][index].float().mul_(held["scales"][index, None])
        if self.columns:
            weight[:, unsigned(held["columns"])] = held["values"][index].float()
        return weight
