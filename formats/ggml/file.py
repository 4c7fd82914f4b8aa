"""A GGUF file, version 3: keys and values, a table of tensors, and their bytes, each on a multiple of 32."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.encoding import Data, align
from formats.errors import FormatError
from formats.ggml.types import BlockType

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MAX_NAME_BYTES = 63
"""Of a tensor: ggml keeps a name in 64 bytes, with a zero behind it."""
_STRING, _ARRAY = 8, 9
_NUMBERS = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7}

Value: TypeAlias = str | list[str] | np.generic | npt.NDArray[Any]
"""A value of a key: text, texts, a number of numpy's type, or several."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the table. shape: rows first, as numpy has it; the file has the innermost first."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def n_bytes(self) -> int:
        n_rows = 1
        for size in self.shape[:-1]:
            n_rows *= size
        return n_rows * self.kind.row_bytes(self.shape[-1])


def write_gguf(
    path: Path,
    values: Mapping[str, Value],
    tensors: Sequence[TensorInfo],
    data: Iterable[Data],
    *,
    overwrite: bool = False,
) -> None:
    """Write a file, which appears complete or not at all.

    data: the bytes of each tensor, in the order of the table; one is held at a time.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(values)))
    for key, value in values.items():
        header += _string(key) + _typed(value)
    offset = 0
    for tensor in tensors:
        header += _entry(tensor, offset)
        offset = align(offset + tensor.n_bytes, ALIGNMENT)
    with new_file(path, overwrite=overwrite) as file:
        file.write(header + _padding(len(header)))
        for tensor, content in zip(tensors, data, strict=True):
            content = memoryview(content).cast("B")
            if len(content) != tensor.n_bytes:
                raise FormatError(f"{path}: {tensor.name}: {len(content)} bytes, its shape takes {tensor.n_bytes}")
            file.write(content)
            file.write(_padding(len(content)))


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """A file beside `path` that gets this name once it is complete and durable; an error removes it."""
    check_free(path, overwrite=overwrite)
    part = path.with_name(f".{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_free(path, overwrite=overwrite)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """FormatError where nothing may be, or can be, written under this name."""
    if path.is_dir():
        raise FormatError(f"{path}: is a folder; give the name of a .gguf file")
    if not overwrite and os.path.lexists(path):
        raise FormatError(f"{path}: exists already; give another name or --force")
    if not path.parent.is_dir():
        raise FormatError(f"{path}: its folder does not exist; make it first")


def _entry(tensor: TensorInfo, offset_bytes: int) -> bytes:
    n_bytes = len(tensor.name.encode())
    if n_bytes > MAX_NAME_BYTES:
        raise FormatError(f"tensor {tensor.name!r}: its name has {n_bytes} bytes, GGUF takes {MAX_NAME_BYTES}")
    dims = tensor.shape[::-1]
    numbers = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind.id, offset_bytes)
    return _string(tensor.name) + numbers


def _typed(value: Value) -> bytes:
    """The type of a value and the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    kind, raw = _NUMBERS[value.dtype.name], value.astype(value.dtype.newbyteorder("<")).tobytes()
    if value.ndim:
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + raw
    return struct.pack("<I", kind) + raw


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padding(n_bytes: int) -> bytes:
    return bytes(align(n_bytes, ALIGNMENT) - n_bytes)
