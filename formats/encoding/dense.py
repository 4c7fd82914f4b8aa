"""`dense` (SPEC 7.2): values as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from formats.encoding.base import ITEM_BYTES, Arrays, Description, Encoding, PartShapes, Shape, Version, register
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from torch import Tensor

# bf16 has no numpy type: its two bytes are carried as u16 (`dense_to_float32` widens them).
DENSE_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}


@register
@dataclass(frozen=True, slots=True)
class Dense(Encoding):
    """SPEC 7.2: the values as they were, row-major; dtype is F16, BF16 or F32."""

    name: ClassVar[str] = "dense"
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DENSE_DTYPES:
            raise FormatError(f"dtype {brief(self.dtype)}: must be one of {', '.join(DENSE_DTYPES)} (SPEC 7.2)")

    @property
    def version(self) -> Version:
        return (1, 0)

    def part_shapes(self, shape: Shape) -> PartShapes:
        return [("values", DENSE_DTYPES[self.dtype], shape)]

    def describe(self, shape: Shape) -> Description:
        return Description(8 * ITEM_BYTES[DENSE_DTYPES[self.dtype]], None, 0)

    def check_values(self, arrays: Arrays, shape: Shape) -> None:
        """Any bits are a value (SPEC 7.2.1)."""

    def check_unused_bits(self, arrays: Arrays, shape: Shape) -> None:
        """There are none."""

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        import torch

        from formats.section import widened

        return torch.from_numpy(widened(arrays["values"], self.dtype))
