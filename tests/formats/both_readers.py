"""The reader of `formats` and the independent one, side by side; and files that claim what nobody wrote."""

import hashlib
import json
import struct
from typing import Any

import independent_reader
import numpy as np
from independent_reader import Contents, Refused

from formats.encoding import Dense
from formats.errors import FormatError
from formats.layer import dequantize
from formats.reader import QtmFile, verify_file


def read_with_formats(data: bytes) -> Contents:
    """A whole file, verified and decoded by `formats.reader`, in the form of the independent reader."""
    with QtmFile(data, "x.qtm") as file:
        verify_file(file)
        tensors = {name: decode(file, name) for name in file.tensors}
        files = {name: file.read_file(name) for name in file.files}
        header = {name: getattr(file.header, name) for name in ("model", "recipe", "provenance", "quality")}
        for entry in file.header.tensors:
            header[entry.name] = (entry.shape, entry.relative_error, entry.transposed)
        return Contents(file.version, header, tensors, files)


def decode(file: QtmFile, name: str) -> np.ndarray:
    if isinstance(file.tensors[name].encoding, Dense):
        return file.dense(name)
    return dequantize(file.layer(name))


def both_read(data: bytes) -> bool:
    """Whether both readers accept the file; fails unless they agree on that and on every bit in it."""
    theirs = attempt(independent_reader.read_bytes, Refused, data)
    ours = attempt(read_with_formats, FormatError, data)
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert isinstance(ours, Exception) and isinstance(theirs, Exception), f"formats: {ours}, independent: {theirs}"
        return False
    assert_same(ours, theirs)
    return True


def attempt(read: Any, refusal: type[Exception], data: bytes) -> Any:
    """What `read` returns, or the error that says no; any other error is one of the reader."""
    try:
        return read(data)
    except refusal as error:
        return error


def assert_same(ours: Contents, theirs: Contents) -> None:
    assert ours.version == theirs.version
    assert ours.files == theirs.files
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, want in theirs.tensors.items():
        got = ours.tensors[name]
        assert isinstance(got, np.ndarray) and isinstance(want, np.ndarray), name  # not a scalar
        assert (got.dtype, got.shape) == (want.dtype, want.shape) == (np.float32, want.shape), name
        assert got.tobytes() == want.tobytes(), name  # bits: -0 is not 0, and a NaN is one NaN only
    members = {name: theirs.header[name] for name in ("model", "recipe", "provenance", "quality")}
    for entry in theirs.header["tensors"]:
        optional = (entry.get("relative_error"), entry.get("transposed", False))
        members[entry["name"]] = (tuple(entry["shape"]), *optional)
    assert ours.header == members


def header_of(data: bytes) -> dict[str, Any]:
    """The header's JSON as it stands."""
    (offset,) = struct.unpack_from("<Q", data, 16)
    header: dict[str, Any] = json.loads(data[offset:])
    return header


def claim(data: bytes, header: dict[str, Any] | bytes | None = None, version: tuple[int, int] = (1, 0)) -> bytes:
    """The file with another header and version, and a digest that fits them."""
    (offset,) = struct.unpack_from("<Q", data, 16)
    raw = json.dumps(header).encode() if isinstance(header, dict) else header or data[offset:]
    fixed = data[:8] + struct.pack("<HHIQQ", *version, 0, offset, len(raw))
    return fixed + hashlib.sha256(fixed + raw).digest() + data[64:offset] + raw
