"""What the section of a matrix is made of: components, each an array of the layer and the parts that hold it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.encoding.base import Arrays, PartShapes, Shape
from formats.encoding.planes import plane_widths, row_words
from formats.errors import FormatError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from formats.kernels.cpu import Rows


class Component(ABC):
    """One attribute of a layer as it is stored: its parts, and the ways between them, numpy and torch."""

    @abstractmethod
    def part_shapes(self) -> PartShapes:
        """(name, numpy dtype, shape) of its parts, in order."""

    @abstractmethod
    def pack(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        """The parts of an attribute."""

    @abstractmethod
    def unpack(self, arrays: Arrays) -> Any:
        """The attribute, copied out of its parts."""

    @abstractmethod
    def check_values(self, arrays: Arrays) -> None:
        """FormatError for a number that cannot be (SPEC 7.6)."""

    @abstractmethod
    def check_unused_bits(self, arrays: Arrays) -> None:
        """FormatError for a bit behind the last field of a row (SPEC 7.4.4)."""

    def hold(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What any rows are decoded of: the parts themselves, as far as they have rows."""
        return {name: parts[name] for name, _, _ in self.part_shapes()}


class RowComponent(Component):
    """A component of which a stripe of rows can be taken."""

    @abstractmethod
    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """These rows of what is held, decoded as far as the component goes."""


@dataclass(slots=True, eq=False)
class Planes(RowComponent):
    """Integers [rows, n] of `bits` bits as bit planes (SPEC 7.4); `flat`: packed as one row, as few are."""

    name: str
    bits: int
    shape: tuple[int, int]
    flat: bool = False

    @property
    def packed_shape(self) -> tuple[int, int]:
        rows, n = self.shape
        return (1, rows * n) if self.flat else (rows, n)

    @property
    def planes(self) -> tuple[tuple[str, int], ...]:
        """Name and width of each, widest first: codes.2, codes.1 for 3 bits."""
        return _planes(self.name, self.bits)

    @property
    def names(self) -> list[str]:
        """Of the planes."""
        return [name for name, _ in self.planes]

    def part_shapes(self) -> PartShapes:
        rows, n = self.packed_shape
        return [(name, "<u4", (rows, row_words(n, width))) for name, width in self.planes]

    def pack(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        from formats.bitpack import pack_codes

        return dict(zip(self.names, pack_codes(value.reshape(self.packed_shape), self.bits), strict=True))

    def unpack(self, arrays: Arrays) -> Any:
        from formats.bitpack import unpack_codes

        planes = [arrays[name] for name in self.names]
        return unpack_codes(planes, self.bits, self.packed_shape[1]).reshape(self.shape)

    def check_values(self, arrays: Arrays) -> None:
        """Any integer of so many bits is good."""

    def check_unused_bits(self, arrays: Arrays) -> None:
        from formats.bitpack import has_unused_bits

        for name, width in self.planes:
            if has_unused_bits(arrays[name], width, self.packed_shape[1]):
                raise FormatError(f"part {name!r}: bits behind the last code are not zero (SPEC 7.4.4)")

    def hold(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flat ones are unpacked: they have no rows to take a stripe of."""
        if not self.flat:
            return {name: parts[name] for name in self.names}
        from formats.kernels.cpu import unpack_codes

        rows, n = self.shape
        flat = unpack_codes([parts[name] for name in self.names], self.bits)[0]
        return {self.name: flat[: rows * n].view(rows, n)}

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """[rows of index, at least n] u8: what a word is padded with may stand behind."""
        if self.flat:
            return held[self.name][index]
        from formats.kernels.cpu import unpack_codes

        return unpack_codes([held[name][index] for name in self.names], self.bits)


@functools.cache
def _planes(name: str, bits: int) -> tuple[tuple[str, int], ...]:
    return tuple((f"{name}.{width}", width) for width in plane_widths(bits))


@dataclass(slots=True, eq=False)
class Plain(RowComponent):
    """An array stored as it is, of which any bits are good."""

    name: str
    dtype: str
    shape: Shape

    def part_shapes(self) -> PartShapes:
        return [(self.name, self.dtype, self.shape)]

    def pack(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        return {self.name: value}

    def unpack(self, arrays: Arrays) -> Any:
        array = arrays[self.name]
        return array.astype(array.dtype.newbyteorder("="))

    def check_values(self, arrays: Arrays) -> None:
        """Nothing to check."""

    def check_unused_bits(self, arrays: Arrays) -> None:
        """There are none."""

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        return held[self.name][index]


@dataclass(slots=True, eq=False)
class Numbers(Plain):
    """Floats, all finite (SPEC 7.6); `what` is one of them in a message."""

    what: str

    def check_values(self, arrays: Arrays) -> None:
        from formats.layer.checks import check_finite

        check_finite(self.what, arrays[self.name])

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """As f32."""
        return held[self.name][index].float()


@dataclass(slots=True, eq=False)
class InputScales(Numbers):
    """The factor of every input (SPEC 7.5.1)."""

    def check_values(self, arrays: Arrays) -> None:
        from formats.layer.checks import check_input_scales

        check_input_scales(arrays[self.name])


class Composite(Component):
    """Several components, the attributes of one object."""

    def __init__(self, members: Mapping[str, Component]) -> None:
        self.members = members

    def part_shapes(self) -> PartShapes:
        return [part for member in self.members.values() for part in member.part_shapes()]

    def pack(self, value: Any) -> dict[str, npt.NDArray[Any]]:
        packed: dict[str, npt.NDArray[Any]] = {}
        for name, member in self.members.items():
            packed |= member.pack(getattr(value, name))
        return packed

    def unpack(self, arrays: Arrays) -> Any:
        """The attributes by name."""
        return {name: member.unpack(arrays) for name, member in self.members.items()}

    def check_values(self, arrays: Arrays) -> None:
        for member in self.members.values():
            member.check_values(arrays)

    def check_unused_bits(self, arrays: Arrays) -> None:
        for member in self.members.values():
            member.check_unused_bits(arrays)

    def hold(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for member in self.members.values():
            held |= member.hold(parts)
        return held
