"""A second reader of `.qtm` files, written from formats/SPEC.md alone: numpy, the standard library, no `formats`.

It is obvious and slow, holds the whole file in memory and always verifies everything (SPEC 9.3). What it refuses,
it refuses with the paragraph that the file breaks. Chapter 7 is in `independent_encodings`,
`independent_values` and `independent_ternary`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
from independent_encodings import ENCODINGS, Refused, align, check_encoding, must, placed
from independent_values import decode

VERSION = (1, 3)
MAGIC = b"\x89QTM\r\n\x1a\n"
MAX_HEADER_BYTES = 16777216
MAX_DEPTH = 64
MAX_ENTRY_CHARS = 16384
MAX_FREE_CHARS = 524288
MAX_SECTIONS = 16384

# Exact types (`type(x) in`): True is an int to isinstance, and no integer to the specification.
HEADER = {"tensors": list, "files": list, "model": dict, "recipe": dict, "provenance": dict, "quality": dict}
SECTION = {"name": str, "offset": int, "bytes": int, "sha256": str}
TENSOR = {**SECTION, "shape": list, "encoding": str}
TENSOR_OPTIONAL = {"relative_error": (int, float), "transposed": bool}


@dataclass(frozen=True)
class Contents:
    version: tuple[int, int]
    header: dict[str, Any]
    tensors: dict[str, np.ndarray]  # float32, as stored: [out, in] also where `transposed` is true
    files: dict[str, bytes]


def read(path: Path) -> Contents:
    """Everything in the file, after everything in it was checked in the order of SPEC 9.1."""
    return read_bytes(path.read_bytes())


def read_bytes(data: bytes) -> Contents:
    version, raw_header = split(data)
    header_offset = len(data) - len(raw_header)
    try:
        header = parse(raw_header)
        check_header(header)
        check_tiling(header, header_offset)
    except Refused as error:
        if version <= VERSION:
            raise
        raise Refused(f"{error}; {both_versions(*version)}") from error
    check_padding(data, header, header_offset)
    for entry in [*header["tensors"], *header["files"]]:
        found = hashlib.sha256(section(data, entry)).hexdigest()
        must(entry["sha256"] == found, "4.4", f"{entry['name']!r}: sha256 is {found}")
    tensors = {entry["name"]: decode(entry, section(data, entry)) for entry in header["tensors"]}
    files = {entry["name"]: section(data, entry) for entry in header["files"]}
    return Contents(version, header, tensors, files)


def both_versions(major: int, minor: int) -> str:
    return f"the file claims version {major}.{minor}, this reader is {VERSION[0]}.{VERSION[1]}"


def section(data: bytes, entry: dict[str, Any]) -> bytes:
    return data[entry["offset"] : entry["offset"] + entry["bytes"]]


# SPEC 2


def split(data: bytes) -> tuple[tuple[int, int], bytes]:
    """The version and the bytes of the header."""
    must(len(data) >= 64, "2.1", f"truncated: {len(data)} bytes")
    magic, major, minor, reserved, offset, n_bytes, digest = struct.unpack_from("<8sHH4sQQ32s", data)
    must(magic == MAGIC, "2.2", f"magic is {magic!r}")
    must(major == VERSION[0], "2.3", both_versions(major, minor))
    must(reserved == bytes(4), "2.4", f"reserved bytes are {reserved!r}")
    must(offset >= 64, "2.5", f"header_offset is {offset}")
    must(offset + n_bytes == len(data), "2.5", f"{offset} + {n_bytes} is not the file's size, {len(data)}")
    must(n_bytes <= MAX_HEADER_BYTES, "2.5", f"header_bytes is {n_bytes}")
    must(digest == hashlib.sha256(data[:32] + data[offset:]).digest(), "2.6", "wrong digest")
    return (major, minor), data[offset:]


# SPEC 3


def parse(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"header is not UTF-8: {error} (SPEC 3.1)") from error
    must(not text.startswith("\ufeff"), "3.1", "byte order mark")
    check_brackets(text)
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number, parse_int=integer)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise Refused(f"header is not JSON: {error} (SPEC 3.1)") from error
    except UnicodeEncodeError as error:
        raise Refused(f"lone surrogate: {error} (SPEC 3.2)") from error
    return value


def check_brackets(text: str) -> None:
    """SPEC 3.2 and 3.2.1, in the text: a parser may run out of stack before it can say, and forgets how it was written.

    A longer key of the header (3.2.1) is not one of the six.
    """
    open_at: list[int] = []
    free_chars = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', text, flags=re.DOTALL):
        if token[0] in "[{":
            open_at.append(token.start())
            must(len(open_at) <= MAX_DEPTH, "3.2", "nested too deeply")
        elif token[0] in "]}" and open_at:
            n_chars, level = token.end() - open_at.pop(), len(open_at) + 1
            free_chars += n_chars if level == 2 and token[0] == "}" else 0
            entry = level == 3 and text[open_at[-1]] == "["
            must(not entry or n_chars <= MAX_ENTRY_CHARS, "3.2.1", f"an entry of {n_chars} characters")
    must(free_chars <= MAX_FREE_CHARS, "3.2.1", f"{free_chars} characters in the four objects")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Keys are compared after their escapes were resolved."""
    must(len(dict(pairs)) == len(pairs), "3.2", f"a key stands twice among {[key for key, _ in pairs]}")
    return dict(pairs)


def number(text: str) -> float:
    must(isfinite(float(text)), "3.2", f"{text[:40]} is not a finite float64")
    return float(text)


def integer(text: str) -> int:
    number(text)
    return int(text)


def check_header(header: Any) -> None:
    check_fields("header", header, HEADER, {})
    must(len(header["tensors"]) + len(header["files"]) <= MAX_SECTIONS, "4.1.1", "too many sections")
    for entry in header["tensors"]:
        check_tensor(entry)
    for entry in header["files"]:
        check_fields("file", entry, SECTION, {})
        check_section(entry)
        check_file_name(entry["name"])
    for kind, paragraph in (("tensors", "5.2"), ("files", "6.2")):
        names = [entry["name"] for entry in header[kind]]
        must(len(set(names)) == len(names), paragraph, f"a name stands twice among the {kind}")
    by_phrases = [entry for entry in header["tensors"] if entry["encoding"] == "ternary_dict"]
    dictionaries = {(entry["share_low"], entry["share_high"]) for entry in by_phrases}
    must(len(dictionaries) <= 32, "7.15.6", f"{len(dictionaries)} dictionaries")


def check_fields(where: str, entry: Any, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """SPEC 3.3 and 3.5: an object, nothing missing, nothing unknown, every field of its type."""
    must(type(entry) is dict, "3.3", f"{where} is not an object")
    for field in required:
        must(field in entry, "3.3", f"{where} lacks {field!r}")
    for field, value in entry.items():
        kind = {**required, **optional}.get(field)
        if kind is None:
            raise Refused(f"{where} has an unknown field {field!r} (SPEC 3.5)")
        must(type(value) in (kind if isinstance(kind, tuple) else (kind,)), "3.3", f"{where}: {field} is {value!r}")
        if kind is int:
            must(0 <= value < 2**63, "3.3", f"{where}: {field} is {value}")


# SPEC 4


def check_section(entry: dict[str, Any]) -> None:
    must(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None, "4.4", f"sha256 is {entry['sha256']!r}")


def places(header: dict[str, Any]) -> list[tuple[int, int]]:
    """(offset, bytes) of every section, in the order of the file."""
    return sorted((entry["offset"], entry["bytes"]) for entry in [*header["tensors"], *header["files"]])


def check_tiling(header: dict[str, Any], header_offset: int) -> None:
    end = 64
    for offset, n_bytes in [*places(header), (header_offset, 0)]:
        must(offset == align(end, 256), "4.2", f"a section or the header at {offset}, behind one that ends at {end}")
        end = offset + n_bytes


def check_padding(data: bytes, header: dict[str, Any], header_offset: int) -> None:
    end = 64
    for offset, n_bytes in [*places(header), (header_offset, 0)]:
        must(not any(data[end:offset]), "4.3", f"padding between {end} and {offset} is not zero")
        end = offset + n_bytes


# SPEC 5 and 6


def check_tensor(entry: Any) -> None:
    must(type(entry) is dict, "5.1", "a tensor is not an object")
    encoding = entry.get("encoding")
    must(type(encoding) is str, "5.1", f"encoding is {encoding!r}")
    must(encoding in ENCODINGS, "7", f"unknown encoding {encoding!r}")
    required, optional = ENCODINGS[encoding]
    check_fields(f"tensor {entry.get('name')!r}", entry, {**TENSOR, **required}, {**TENSOR_OPTIONAL, **optional})
    check_section(entry)
    name, shape = entry["name"], entry["shape"]
    must(1 <= len(name.encode()) <= 1024 and not has_controls(name), "5.2", f"tensor name {name!r}")
    must(len(shape) <= 8, "5.3", f"{name!r}: {len(shape)} dimensions")
    must(all(type(size) is int and 1 <= size < 2**63 for size in shape), "5.3", f"{name!r}: shape {shape}")
    must(prod(shape) <= 2**48, "5.3", f"{name!r}: shape {shape}")
    must(entry.get("relative_error", 0) >= 0, "5.5", f"{name!r}: relative_error is negative")
    must(not entry.get("transposed", False) or len(shape) == 2, "5.6", f"{name!r}: transposed, with shape {shape}")
    check_encoding(entry)
    *_, end = [0, *(start + part.n_bytes for start, part in placed(entry))]
    must(entry["bytes"] == end, "5.4", f"{name!r}: {entry['bytes']} bytes, its parts take {end}")


def check_file_name(name: str) -> None:
    plain = name not in ("", ".", "..") and not set(name) & set("/\\:") and not has_controls(name)
    must(plain and len(name.encode()) <= 255, "6.2", f"file name {name!r}")


def has_controls(name: str) -> bool:
    return any(ord(char) <= 0x1F or 0x7F <= ord(char) <= 0x9F for char in name)
