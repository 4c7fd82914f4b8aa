"""The header (SPEC 3 to 6): the table of everything in the file, strictly parsed and canonically written."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from formats.encoding import Dense, Encoding, Shape, Uniform, align, encoding_from_fields
from formats.errors import FormatError, error_context
from formats.preamble import PREAMBLE_BYTES
from formats.strict_json import as_integer, as_list, as_object, as_text, brief, load_object

SECTION_ALIGNMENT = 256
MAX_DIMS = 8
MAX_ELEMENTS = 2**48
MAX_TENSOR_NAME_BYTES = 1024
MAX_FILE_NAME_BYTES = 255

_FREE_MEMBERS = ("model", "recipe", "provenance", "quality")
_SECTION_FIELDS = ("name", "offset", "bytes", "sha256")
_TENSOR_FIELDS = (*_SECTION_FIELDS, "shape", "encoding", "relative_error", "transposed")
# Control characters could drive a terminal that prints the name; a lone surrogate is not text.
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """An embedded file (SPEC 6)."""

    name: str
    offset_bytes: int
    n_bytes: int
    sha256: str

    @property
    def label(self) -> str:
        return f"file {self.name!r}"

    def fields(self) -> dict[str, Any]:
        """The entry as it stands in the header."""
        place = {"offset": self.offset_bytes, "bytes": self.n_bytes}
        return {"name": self.name, "sha256": self.sha256} | place


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor (SPEC 5). `transposed`: the model's own tensor is the transpose of the stored matrix."""

    name: str
    shape: Shape
    encoding: Dense | Uniform
    offset_bytes: int
    n_bytes: int
    sha256: str
    relative_error: float | None = None
    transposed: bool = False

    @property
    def label(self) -> str:
        return f"tensor {self.name!r}"

    def fields(self) -> dict[str, Any]:
        """The entry as it stands in the header; a default is left out, so that it has one spelling."""
        place = {"offset": self.offset_bytes, "bytes": self.n_bytes, "shape": list(self.shape)}
        entry = {"name": self.name, "sha256": self.sha256} | place | self.encoding.fields()
        if self.relative_error is not None:
            entry["relative_error"] = self.relative_error
        return entry | ({"transposed": True} if self.transposed else {})


Section: TypeAlias = TensorEntry | FileEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """All members of the header; the four free objects hold any JSON (SPEC 3.4)."""

    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    model: Mapping[str, Any]
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    quality: Mapping[str, Any]

    def sections(self) -> list[Section]:
        """Every section in the order of the file; an empty file comes before what starts where it lies."""
        sections: list[Section] = [*self.tensors, *self.files]
        return sorted(sections, key=lambda section: (section.offset_bytes, section.n_bytes))


def serialise_header(header: Header) -> bytes:
    """Canonical JSON (SPEC 3.1): the same header always gives the same bytes."""
    tree: dict[str, Any] = {name: getattr(header, name) for name in _FREE_MEMBERS}
    tree["tensors"] = [entry.fields() for entry in header.tensors]
    tree["files"] = [entry.fields() for entry in header.files]
    try:
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"header cannot be written as JSON: {error} (SPEC 3.1)") from error


def parse_header(data: bytes, header_offset: int) -> Header:
    """The header of a file whose header starts at `header_offset`, every claim checked."""
    tree = load_object(data)
    _check_members("header", tree, required=("tensors", "files", *_FREE_MEMBERS))
    for name in _FREE_MEMBERS:
        as_object(name, tree[name])
    header = Header(
        tensors=tuple(_tensor_entry(entry) for entry in as_list("tensors", tree["tensors"])),
        files=tuple(_file_entry(entry) for entry in as_list("files", tree["files"])),
        **{name: tree[name] for name in _FREE_MEMBERS},
    )
    check_unique(header.tensors)
    check_unique(header.files)
    _check_tiling(header.sections(), header_offset)
    return header


def check_unique(entries: Iterable[Section]) -> None:
    """Refuse a name that stands twice (SPEC 5.2, 6.2)."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise FormatError(f"{entry.label}: the name stands twice (SPEC 5.2, 6.2)")
        seen.add(entry.name)


def check_tensor_name(name: str) -> None:
    """SPEC 5.2."""
    if _NOT_TEXT.search(name) or not 1 <= len(name.encode("utf-8")) <= MAX_TENSOR_NAME_BYTES:
        raise FormatError(
            f"tensor {brief(name)}: a name has 1 to {MAX_TENSOR_NAME_BYTES} bytes and no control characters (SPEC 5.2)"
        )


def check_file_name(name: str) -> None:
    """SPEC 6.2: a plain name, so that no reader that unpacks it can leave its folder."""
    plain = name not in ("", ".", "..") and not any(mark in name for mark in "/\\:")
    if not plain or _NOT_TEXT.search(name) or len(name.encode("utf-8")) > MAX_FILE_NAME_BYTES:
        raise FormatError(f"file {brief(name)}: must be a plain file name without a folder (SPEC 6.2)")


def check_tensor(
    shape: Shape, encoding: Encoding, *, n_bytes: int, transposed: bool, relative_error: float | None
) -> None:
    """SPEC 5.3 to 5.6: shape, the bytes it implies, and what the optional fields may be."""
    if len(shape) > MAX_DIMS or any(size < 1 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise FormatError(
            f"shape {brief(list(shape))}: at most {MAX_DIMS} sizes of 1 or more and 2**48 elements (SPEC 5.3)"
        )
    if n_bytes != encoding.section_bytes(shape):
        raise FormatError(
            f"{n_bytes} bytes, but {encoding.name} {list(shape)} takes {encoding.section_bytes(shape)} (SPEC 5.4)"
        )
    # Written so that NaN fails too.
    if relative_error is not None and not 0 <= relative_error <= sys.float_info.max:
        raise FormatError(f"relative_error={brief(relative_error)}: must be finite and not negative (SPEC 5.5)")
    if transposed and len(shape) != 2:
        raise FormatError(f"shape {list(shape)}: only a matrix can be transposed (SPEC 5.6)")


def _tensor_entry(value: Any) -> TensorEntry:
    entry = as_object("tensor entry", value)
    name = as_text("name of a tensor", entry.get("name"))
    check_tensor_name(name)
    with error_context(f"tensor {name!r}"):
        encoding = encoding_from_fields(entry)
        _check_members("entry", entry, (*_SECTION_FIELDS, "shape"), (*_TENSOR_FIELDS, *encoding.fields()))
        shape = tuple(as_integer("shape", size) for size in as_list("shape", entry["shape"]))
        error, transposed = entry.get("relative_error"), entry.get("transposed", False)
        if "relative_error" in entry and type(error) not in (int, float):
            raise FormatError(f"relative_error={brief(error)}: must be a number (SPEC 5.5)")
        if type(transposed) is not bool:
            raise FormatError(f"transposed={brief(transposed)}: must be true or false (SPEC 5.6)")
        place = _place(entry)
        check_tensor(shape, encoding, n_bytes=place["n_bytes"], transposed=transposed, relative_error=error)
        return TensorEntry(
            name=name,
            shape=shape,
            encoding=encoding,
            relative_error=error,
            transposed=transposed,
            sha256=_sha256(entry),
            **place,
        )


def _file_entry(value: Any) -> FileEntry:
    entry = as_object("file entry", value)
    name = as_text("name of a file", entry.get("name"))
    check_file_name(name)
    with error_context(f"file {name!r}"):
        _check_members("entry", entry, required=_SECTION_FIELDS)
        return FileEntry(name=name, sha256=_sha256(entry), **_place(entry))


def _check_tiling(sections: Iterable[Section], header_offset: int) -> None:
    """SPEC 4.2: no hole, no overlap, nothing behind: a byte of the file has exactly one meaning."""
    end = PREAMBLE_BYTES
    for section in sections:
        if section.offset_bytes != align(end, SECTION_ALIGNMENT):
            wanted = align(end, SECTION_ALIGNMENT)
            raise FormatError(f"{section.label}: starts at {section.offset_bytes}, must be {wanted} (SPEC 4.2)")
        end = section.offset_bytes + section.n_bytes
    if header_offset != align(end, SECTION_ALIGNMENT):
        wanted = align(end, SECTION_ALIGNMENT)
        raise FormatError(f"header: starts at {header_offset}, must be {wanted} (SPEC 4.2)")


def _place(entry: Mapping[str, Any]) -> dict[str, int]:
    return {
        "offset_bytes": as_integer("offset", entry["offset"]),
        "n_bytes": as_integer("bytes", entry["bytes"]),
    }


def _sha256(entry: Mapping[str, Any]) -> str:
    value = entry["sha256"]
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise FormatError(f"sha256={brief(value)}: must be 64 lower-case hexadecimal digits (SPEC 4.4)")
    return value


def _check_members(label: str, tree: Mapping[str, Any], required: Iterable[str], known: Iterable[str] = ()) -> None:
    required = set(required)
    missing, unknown = sorted(required - set(tree)), sorted(set(tree) - required - set(known))
    if missing:
        raise FormatError(f"{label} has no field {missing[0]!r} (SPEC 3.3, 5.1, 6.1)")
    if unknown:  # refused, so that a misspelt or newer field is never ignored in silence
        raise FormatError(f"{label} has an unknown field {brief(unknown[0])} (SPEC 3.5)")
