"""What `ternary_dict` and `ternary_rans` share: values -1, 0 and 1 in a stream, and what -1 and +1 of each row mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.encoding.base import Arrays, Description, Shape, Version
from formats.encoding.component import Component, InputScales, Numbers
from formats.encoding.matrix import INPUT_SCALES, MatrixEncoding
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.ternary import TernaryLinear

MAX_ITEMS = (1 << 32) - 1


class TernaryStream(Component):
    """The values [out, in] of a layer; what an attribute of it packs to is made once, with the encoding's fields."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @abstractmethod
    def decode(self, arrays: Arrays, rows: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Some rows, whatever the bytes: rows [m] i64; values [m, 2], what -1 and +1 stand for  ->  [m, in] likewise"""

    def pack(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        return dict(value.parts)

    def unpack(self, arrays: Arrays) -> Any:
        """Codes [out, in] i8."""
        import numpy as np

        rows = np.arange(self.shape[0])
        return self.decode(arrays, rows, np.tile(np.array([-1, 1], np.int8), (len(rows), 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TernaryEncoding(MatrixEncoding):
    """Their components: a stream of values, two scales a row, and a factor for every input, where there are any."""

    input_scales: bool = False

    @property
    def version(self) -> Version:
        return (1, 2)

    @abstractmethod
    def stream(self, shape: Shape) -> TernaryStream:
        """What holds the values."""

    @abstractmethod
    def stream_bits(self, shape: Shape) -> int:
        """Of all values together, what is stored once for all of them or once a row not counted."""

    def components(self, shape: Shape) -> Mapping[str, Component]:
        found: dict[str, Component] = {
            "stream": self.stream(shape),
            "scales": Numbers("scales", "<f2", (shape[0], 2), "a scale"),
        }
        if self.input_scales:
            found[INPUT_SCALES] = InputScales(INPUT_SCALES, "<f2", (shape[1],), "an input scale")
        return found

    def describe(self, shape: Shape) -> Description:
        """Bits: of a value in the stream, rounded up: 1 for whatever is below one bit."""
        return Description(max(1, -(-self.stream_bits(shape) // (shape[0] * shape[1]))), None, 0)

    def unpack(self, arrays: Arrays, shape: Shape) -> TernaryLinear:
        from formats.layer.ternary import TernaryLinear

        attributes = self.composite(shape).unpack(arrays)
        return TernaryLinear(codes=attributes.pop("stream"), coding=self.name, **attributes)

    def rows(self, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        import torch

        from formats.kernels.cpu import as_arrays, row_numbers

        stream = self.stream(shape)
        numbers = row_numbers(index, shape[0])
        arrays = as_arrays(held, stream.part_shapes())
        return torch.from_numpy(stream.decode(arrays, numbers.numpy(), held["scales"][numbers].float().numpy()))


def check_count(name: str, count: int, least: int, most: int, paragraph: str) -> None:
    """Refuse a length that no stream of these values has, before anything is allocated for it."""
    most = min(most, MAX_ITEMS)
    if not least <= count <= most:
        raise FormatError(f"{name}={brief(count)}: must be {least} to {most} (SPEC {paragraph})")
