"""How a tensor is stored (SPEC 7): its encoding, and where each part lies in its section.

Without numpy, whose import takes longer than listing a file: `formats.section` has what touches arrays.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from formats.layer import QuantizedLinear

MIN_BITS = 2
MAX_BITS = 8
WORD_BITS = 32

PART_ALIGNMENT = 64
# bf16 has no numpy type: its two bytes are carried as u16 (`dense_to_float32` widens them).
DENSE_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}

Shape: TypeAlias = tuple[int, ...]
Data: TypeAlias = bytes | bytearray | memoryview
PartShapes: TypeAlias = Sequence[tuple[str, str, Shape]]


@dataclass(frozen=True, slots=True)
class Part:
    """One array inside a section; `offset_bytes` counts from the start of the section."""

    name: str
    dtype: str  # as numpy writes it; it ends with the size of an item: <u4, <f2
    shape: Shape
    offset_bytes: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype[2:])

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.n_bytes


class Encoding(ABC):
    """How a tensor is stored. A subclass is a frozen dataclass; its fields are its fields in the header."""

    name: ClassVar[str]

    def fields(self) -> dict[str, Any]:
        """The members that this encoding puts in a tensor's entry (SPEC 5.1)."""
        own = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: getattr(self, field.name) for field in own}
        # A default is left out, so that it has one spelling.
        return {"encoding": self.name} | {f.name: values[f.name] for f in own if values[f.name] is not f.default}

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """The arrays of a section in order, each starting on a multiple of 64 bytes (SPEC 7.1)."""
        return _parts(self, shape)

    def section_bytes(self, shape: Shape) -> int:
        """Bytes of the section of a tensor of this shape: up to the end of its last part (SPEC 7.1)."""
        return self.parts(shape)[-1].end_bytes

    @abstractmethod
    def part_shapes(self, shape: Shape) -> PartShapes:
        """(name, numpy dtype, shape) of every part, in order; FormatError when `shape` cannot be stored."""


@dataclass(frozen=True, slots=True)
class Dense(Encoding):
    """SPEC 7.2: the values as they were, row-major; dtype is F16, BF16 or F32."""

    name: ClassVar[str] = "dense"
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DENSE_DTYPES:
            raise FormatError(f"dtype {brief(self.dtype)}: must be one of {', '.join(DENSE_DTYPES)} (SPEC 7.2)")

    def part_shapes(self, shape: Shape) -> PartShapes:
        return [("values", DENSE_DTYPES[self.dtype], shape)]


@dataclass(frozen=True, slots=True)
class Uniform(Encoding):
    """SPEC 7.3: codes of `bits` bits with an fp16 scale, and a zero unless symmetric, per row and group.

    With `input_scales`, a factor for every input besides.
    """

    name: ClassVar[str] = "uniform"
    bits: int
    group_size: int
    symmetric: bool
    input_scales: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise FormatError(f"bits={brief(self.bits)}: must be {MIN_BITS} to {MAX_BITS} (SPEC 7.3)")
        if self.group_size < 1:
            raise FormatError(f"group_size={brief(self.group_size)}: must be 1 or more (SPEC 7.3)")

    def part_shapes(self, shape: Shape) -> PartShapes:
        if len(shape) != 2:
            raise FormatError(f"shape {list(shape)}: uniform needs two dimensions (SPEC 7.3)")
        out_features, in_features = shape
        if self.group_size > in_features:
            raise FormatError(f"group_size={brief(self.group_size)}: more than {in_features} inputs (SPEC 7.3)")
        n_groups = -(-in_features // self.group_size)
        parts = self._plane_shapes("codes", out_features, in_features)
        parts.append(("scales", "<f2", (out_features, n_groups)))
        if not self.symmetric:
            parts += self._plane_shapes("zeros", 1, out_features * n_groups)
        return [*parts, ("input_scales", "<f2", (in_features,))] if self.input_scales else parts

    def plane_names(self, field: str) -> list[str]:
        """Part names of the planes of `codes` or `zeros`, widest first: codes.2, codes.1 for 3 bits."""
        return [f"{field}.{width}" for width in plane_widths(self.bits)]

    def _plane_shapes(self, field: str, rows: int, n: int) -> list[tuple[str, str, Shape]]:
        names = self.plane_names(field)
        widths = plane_widths(self.bits)
        return [(name, "<u4", (rows, row_words(n, w))) for name, w in zip(names, widths, strict=True)]


ENCODINGS: dict[str, type[Dense] | type[Uniform]] = {kind.name: kind for kind in (Dense, Uniform)}


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, widest first: the powers of two that add up to `bits` (SPEC 7.4.1)."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise FormatError(f"bits={bits}: must be {MIN_BITS} to {MAX_BITS} (SPEC 7.3)")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def row_words(n: int, width: int) -> int:
    """32-bit words that hold one row of `n` fields of `width` bits (SPEC 7.4.2)."""
    return -(-n * width // WORD_BITS)


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


def encoding_from_fields(entry: Mapping[str, Any]) -> Dense | Uniform:
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
        values.append(value)
    return _encoding(kind, *values)


@functools.cache
def _fields(kind: type[Dense] | type[Uniform]) -> list[tuple[str, type, Any]]:
    """Name, type and default of each field; None, which no field may be, where there is no default."""
    fields = [(f, None if f.default is dataclasses.MISSING else f.default) for f in dataclasses.fields(kind)]
    return [(field.name, cast(type, field.type), default) for field, default in fields]


@functools.lru_cache(maxsize=1024)
def _encoding(kind: Callable[..., Dense | Uniform], *values: Any) -> Dense | Uniform:
    """One object for all tensors of a file that are stored alike."""
    return kind(*values)


def encoding_of(layer: "QuantizedLinear") -> Uniform:
    """The encoding that stores this layer exactly."""
    return Uniform(
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=layer.symmetric,
        input_scales=layer.input_scales is not None,
    )
