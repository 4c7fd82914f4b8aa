"""What every encoding is (SPEC 7): its fields in the header, and where each part lies in its section.

Without numpy, whose import takes longer than listing a file: what touches arrays imports it when it is called.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar, get_type_hints

from formats.errors import FormatError
from formats.strict_json import as_integer, brief

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

PART_ALIGNMENT = 64
# The types of a part as numpy writes them, and the bytes of an item.
ITEM_BYTES = {"|i1": 1, "|u1": 1, "<f2": 2, "<u2": 2, "<f4": 4, "<u4": 4}

Shape: TypeAlias = tuple[int, ...]
Data: TypeAlias = bytes | bytearray | memoryview
PartShapes: TypeAlias = Sequence[tuple[str, str, Shape]]
Version: TypeAlias = tuple[int, int]
Arrays: TypeAlias = "Mapping[str, npt.NDArray[Any]]"
"""The parts of one section by name."""


@dataclass(frozen=True, slots=True)
class Part:
    """One array inside a section; `offset_bytes` counts from the start of the section."""

    name: str
    dtype: str  # one of ITEM_BYTES
    shape: Shape
    offset_bytes: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.n_bytes


class Description(NamedTuple):
    """An encoding in a listing."""

    bits: int  # of one stored value, what is stored besides not counted
    group_size: int | None  # inputs that share a scale, where an encoding has such groups
    outliers: int  # weights that are stored apart


class Encoding(ABC):
    """How a tensor is stored. A subclass is a frozen dataclass; its fields are its fields in the header.

    A file in this folder whose subclass is `register`ed adds an encoding; nothing else has to know of it.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def version(self) -> Version:
        """The first version of the format that has all that is used here (SPEC 2.3.2)."""

    @abstractmethod
    def part_shapes(self, shape: Shape) -> PartShapes:
        """(name, numpy dtype, shape) of every part, in order; FormatError when `shape` cannot be stored."""

    @abstractmethod
    def describe(self, shape: Shape) -> Description:
        """What a listing of the file says about a tensor of this shape."""

    @abstractmethod
    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        """The values [shape] f32 that parts (views of a section) whose values were checked stand for; a copy."""

    @abstractmethod
    def check_values(self, arrays: Arrays, shape: Shape) -> None:
        """FormatError for a number that is not as SPEC 7 says: what a reader checks whenever it decodes (7.6)."""

    @abstractmethod
    def check_unused_bits(self, arrays: Arrays, shape: Shape) -> None:
        """FormatError for a bit set that means nothing (SPEC 7.4.4): what a reader checks when it verifies."""

    @property
    def dictionary(self) -> tuple[int, ...] | None:
        """What a large table is made by that a reader needs, if it needs one (SPEC 7.15.6)."""
        return None

    def fields(self) -> dict[str, Any]:
        """The members that this encoding puts in a tensor's entry (SPEC 5.1)."""
        own = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in own}
        # A default is left out, so that it has one spelling.
        return {"encoding": self.name} | {f.name: values[f.name] for f in own if values[f.name] != f.default}

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """The arrays of a section in order, each starting on a multiple of 64 bytes (SPEC 7.1)."""
        return _parts(self, shape)

    def section_bytes(self, shape: Shape) -> int:
        """Bytes of the section of a tensor of this shape: up to the end of its last part (SPEC 7.1)."""
        end = 0  # without `parts`, and in the fewest steps: a header may have 16384 tensors, none like another
        for _, dtype, part_shape in self.part_shapes(shape):
            n_bytes = ITEM_BYTES[dtype]
            for size in part_shape:
                n_bytes *= size
            end = (end + PART_ALIGNMENT - 1 & -PART_ALIGNMENT) + n_bytes
        return end


ENCODINGS: dict[str, type[Encoding]] = {}
"""Every encoding that this reader knows, by its name in the header."""

AnyEncoding = TypeVar("AnyEncoding", bound=type[Encoding])


def register(kind: AnyEncoding) -> AnyEncoding:
    """Class decorator: make an encoding known to reader and writer."""
    ENCODINGS[kind.name] = kind
    return kind


def align(offset_bytes: int, alignment: int) -> int:
    """The next multiple of `alignment` at or after `offset_bytes`."""
    return -(-offset_bytes // alignment) * alignment


@functools.lru_cache(maxsize=1024)
def _parts(encoding: Encoding, shape: Shape) -> tuple[Part, ...]:
    """Kept, because the many experts of a large model share a handful of shapes."""
    parts: list[Part] = []
    for name, dtype, part_shape in encoding.part_shapes(shape):
        end = parts[-1].end_bytes if parts else 0
        parts.append(Part(name, dtype, part_shape, align(end, PART_ALIGNMENT)))
    return tuple(parts)


def encoding_from_fields(entry: Mapping[str, Any]) -> Encoding:
    """The encoding named in a tensor's entry; FormatError when it or one of its fields is not known."""
    name = entry.get("encoding")
    if not isinstance(name, str) or name not in ENCODINGS:
        raise FormatError(f"unknown encoding {brief(name)}; this reader knows {', '.join(ENCODINGS)} (SPEC 7)")
    kind = ENCODINGS[name]
    values = []
    for field, wanted, default in _fields(kind):
        value = entry.get(field, default)
        if type(value) is not wanted:  # not isinstance: JSON's true is not the number 1
            raise FormatError(f"{field}={brief(value)}: must be {wanted.__name__} (SPEC 5.1)")
        if wanted is int:
            as_integer(field, value)
        values.append(value)
    return _encoding(kind, *values)


@functools.cache
def _fields(kind: type[Encoding]) -> list[tuple[str, type, Any]]:
    """Name, type and default of each field; None, which no field may be, where there is no default."""
    types = get_type_hints(kind)
    fields = [(f, None if f.default is dataclasses.MISSING else f.default) for f in _dataclass_fields(kind)]
    return [(field.name, types[field.name], default) for field, default in fields]


@functools.cache
def field_names(kind: type[Encoding]) -> frozenset[str]:
    """The members that an encoding may add to a tensor's entry."""
    return frozenset(field.name for field in _dataclass_fields(kind))


def _dataclass_fields(kind: type[Encoding]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _encoding(kind: type[Encoding], *values: Any) -> Encoding:
    """One object for all tensors of a file that are stored alike."""
    return kind(**{field: value for (field, _, _), value in zip(_fields(kind), values, strict=True)})
