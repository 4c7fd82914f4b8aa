"""A tensor as the bytes of its section (SPEC 7): where each part lies, packing and unpacking."""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.bitpack import (
    MAX_BITS,
    MIN_BITS,
    has_unused_bits,
    pack_codes,
    plane_widths,
    row_words,
    unpack_codes,
)
from formats.errors import FormatError
from formats.layer import QuantizedLinear
from formats.strict_json import brief

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
    dtype: str
    shape: Shape
    offset_bytes: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

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
        parts: list[Part] = []
        for name, dtype, part_shape in self.part_shapes(shape):
            end = parts[-1].end_bytes if parts else 0
            parts.append(Part(name, dtype, part_shape, align(end, PART_ALIGNMENT)))
        return tuple(parts)

    def section_bytes(self, shape: Shape) -> int:
        """Bytes of the section of a tensor of this shape: up to the end of its last part (SPEC 7.1)."""
        return _section_bytes(self, shape)

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


def align(offset_bytes: int, alignment: int) -> int:
    """The next multiple of `alignment` at or after `offset_bytes`."""
    return -(-offset_bytes // alignment) * alignment


@functools.lru_cache(maxsize=1024)
def _section_bytes(encoding: Encoding, shape: Shape) -> int:
    """Kept, because the thousands of experts of a large model share a handful of shapes."""
    return encoding.parts(shape)[-1].end_bytes


def encoding_from_fields(entry: Mapping[str, Any]) -> Dense | Uniform:
    """The encoding named in a tensor's entry; FormatError when it or one of its fields is not known."""
    name = entry.get("encoding")
    if not isinstance(name, str) or name not in ENCODINGS:
        raise FormatError(f"unknown encoding {brief(name)}; this reader knows {', '.join(ENCODINGS)} (SPEC 7)")
    kind = ENCODINGS[name]
    defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {field: entry.get(field, default) for field, default in defaults.items()}
    for field in dataclasses.fields(kind):
        # `type is`, not isinstance: JSON's true is not the number 1.
        if type(values[field.name]) is not field.type:
            wanted = getattr(field.type, "__name__", field.type)
            raise FormatError(f"{field.name}={brief(values[field.name])}: must be {wanted} (SPEC 5.1)")
    return kind(**values)


def encoding_of(layer: QuantizedLinear) -> Uniform:
    """The encoding that stores this layer exactly."""
    return Uniform(
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=layer.symmetric,
        input_scales=layer.input_scales is not None,
    )


def part_arrays(data: Data, shape: Shape, encoding: Encoding) -> dict[str, npt.NDArray[Any]]:
    """The parts of a section by name, as views of `data`: no copy."""
    if len(data) != encoding.section_bytes(shape):
        raise FormatError(f"{len(data)} bytes, must be {encoding.section_bytes(shape)} (SPEC 5.4)")
    return {
        part.name: np.frombuffer(data, part.dtype, math.prod(part.shape), part.offset_bytes).reshape(part.shape)
        for part in encoding.parts(shape)
    }


def pack(layer: QuantizedLinear) -> bytes:
    """The section of a layer under `encoding_of(layer)`; `unpack` returns the same layer, bit for bit."""
    encoding = encoding_of(layer)
    values: dict[str, npt.NDArray[Any]] = {"scales": layer.scales}
    values |= zip(encoding.plane_names("codes"), pack_codes(layer.codes, layer.bits), strict=True)
    if layer.zeros is not None:
        zeros = layer.zeros.reshape(1, -1)  # as one row: a row of G zeros alone would be padded to a word
        values |= zip(encoding.plane_names("zeros"), pack_codes(zeros, layer.bits), strict=True)
    if layer.input_scales is not None:
        values["input_scales"] = layer.input_scales
    shape = (layer.out_features, layer.in_features)
    section = bytearray(encoding.section_bytes(shape))
    for name, array in part_arrays(section, shape, encoding).items():
        array[...] = values[name]
    return bytes(section)


def unpack(data: Data, shape: Shape, encoding: Uniform) -> QuantizedLinear:
    """The layer of a `uniform` section; its arrays are copies and outlive `data`."""
    arrays = part_arrays(data, shape, encoding)
    scales = arrays["scales"].astype(np.float16)  # [out, G]

    def integers(field: str, n: int) -> npt.NDArray[np.uint8]:
        return unpack_codes([arrays[name] for name in encoding.plane_names(field)], encoding.bits, n)

    return QuantizedLinear(
        codes=integers("codes", shape[1]),
        scales=scales,
        zeros=None if encoding.symmetric else integers("zeros", scales.size).reshape(scales.shape),
        bits=encoding.bits,
        group_size=encoding.group_size,
        input_scales=arrays["input_scales"].astype(np.float16) if encoding.input_scales else None,
    )


def dense_to_float32(data: Data, shape: Shape, dtype: str) -> npt.NDArray[np.float32]:
    """The values of a `dense` section as float32, exact for every stored type.  -> `shape` f32, a copy"""
    raw = part_arrays(data, shape, Dense(dtype))["values"]
    if dtype == "BF16":  # a bf16 is the upper half of a float32
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


def check_section(data: Data, shape: Shape, encoding: Encoding) -> None:
    """What a hash cannot tell: zero gaps and unused bits, finite scales (SPEC 4.3, 7.4.4, 7.6)."""
    arrays = part_arrays(data, shape, encoding)
    end = 0
    for part in encoding.parts(shape):
        if any(data[end : part.offset_bytes]):
            raise FormatError(f"bytes before part {part.name!r} are not zero (SPEC 4.3)")
        end = part.end_bytes
    if isinstance(encoding, Uniform):
        _check_uniform(arrays, shape, encoding)


def check_scales(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """SPEC 7.6, for the parts of a `uniform` section."""
    if not np.isfinite(arrays["scales"]).all():
        raise FormatError("a scale is NaN or infinite (SPEC 7.6)")
    inputs = arrays.get("input_scales", np.ones(1, np.float16))
    if not (np.isfinite(inputs) & (inputs > 0)).all():
        raise FormatError("an input scale is NaN, infinite or not above 0 (SPEC 7.6)")


def _check_uniform(arrays: Mapping[str, npt.NDArray[Any]], shape: Shape, encoding: Uniform) -> None:
    check_scales(arrays)
    lengths = {"codes": shape[1]} | ({} if encoding.symmetric else {"zeros": arrays["scales"].size})
    for field, n in lengths.items():
        for name, width in zip(encoding.plane_names(field), plane_widths(encoding.bits), strict=True):
            if has_unused_bits(arrays[name], width, n):
                raise FormatError(f"part {name!r}: bits behind the last code are not zero (SPEC 7.4.4)")
