"""The header (SPEC 3 to 6): the table of everything in the file, strictly parsed and canonically written."""

import functools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from formats.encoding import Encoding, Shape, Version, align, encoding_from_fields, field_names
from formats.errors import FormatError, error_context
from formats.preamble import OLDEST_VERSION, PREAMBLE_BYTES
from formats.strict_json import MAX_ENTRIES, JsonCursor, as_integer, as_list, as_object, as_text, brief, max_entries

SECTION_ALIGNMENT = 256
MAX_DICTIONARIES = 32
MANY_SECTIONS = (1, 3)
"""The version that allows more than 1.0 does (SPEC 4.1.1)."""
MAX_DIMS = 8
MAX_ELEMENTS = 2**48
MAX_TENSOR_NAME_BYTES = 1024
MAX_FILE_NAME_BYTES = 255

_FREE_MEMBERS = ("model", "recipe", "provenance", "quality")
_HEADER_MEMBERS = frozenset({"tensors", "files", *_FREE_MEMBERS})
_SECTION_FIELDS = frozenset({"name", "offset", "bytes", "sha256"})
_TENSOR_REQUIRED = _SECTION_FIELDS | {"shape", "encoding"}
_TENSOR_FIELDS = _TENSOR_REQUIRED | {"relative_error", "transposed"}
# Control characters could drive a terminal that prints the name; a lone surrogate is not text.
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(NamedTuple):
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


class TensorEntry(NamedTuple):
    """A tensor (SPEC 5). `transposed`: the model's own tensor is the transpose of the stored matrix."""

    name: str
    shape: Shape
    encoding: Encoding
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

    @property
    def version(self) -> Version:
        """The lowest that has all that the file uses (SPEC 2.3.2)."""
        many = [MANY_SECTIONS] if len(self.tensors) + len(self.files) > MAX_ENTRIES else []
        return max([OLDEST_VERSION, *many, *(entry.encoding.version for entry in self.tensors)])

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
    with error_context("header"):
        return _parse_header(JsonCursor(data, max_entries(header_offset)), header_offset)


def _parse_header(cursor: JsonCursor, header_offset: int) -> Header:
    members: dict[str, Any] = {}
    for name in cursor.members():
        if name == "tensors":
            members[name] = tuple(tensor_entry(entry) for entry in cursor.entries(name))
        elif name == "files":
            members[name] = tuple(_file_entry(entry) for entry in cursor.entries(name))
        elif name in _FREE_MEMBERS:
            members[name] = cursor.free_object(name)
        else:
            raise FormatError(f"unknown field {brief(name)} (SPEC 3.5)")
    _check_members(members, _HEADER_MEMBERS, _HEADER_MEMBERS)
    header = Header(**members)
    check_unique(header.tensors)
    check_dictionaries(header.tensors)
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


def check_dictionaries(tensors: Iterable[TensorEntry]) -> None:
    """FormatError for a file whose tensors need more tables than it is worth to make (SPEC 7.15.6)."""
    needed = {entry.encoding.dictionary for entry in tensors} - {None}
    if len(needed) > MAX_DICTIONARIES:
        raise FormatError(f"{len(needed)} dictionaries: at most {MAX_DICTIONARIES} in a file (SPEC 7.15.6)")


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
    wanted = _section_bytes(shape, encoding)
    if n_bytes != wanted:
        raise FormatError(f"{n_bytes} bytes, but {encoding.name} {list(shape)} takes {wanted} (SPEC 5.4)")
    # Written so that NaN fails too.
    if relative_error is not None and not 0 <= relative_error <= sys.float_info.max:
        raise FormatError(f"relative_error={brief(relative_error)}: must be finite and not negative (SPEC 5.5)")
    if transposed and len(shape) != 2:
        raise FormatError(f"shape {list(shape)}: only a matrix can be transposed (SPEC 5.6)")


@functools.lru_cache(maxsize=1024)
def _section_bytes(shape: Shape, encoding: Encoding) -> int:
    """What `check_tensor` asks of a shape; kept, because many tensors share it."""
    if len(shape) > MAX_DIMS or any(size < 1 for size in shape) or math.prod(shape) > MAX_ELEMENTS:
        raise FormatError(
            f"shape {brief(list(shape))}: at most {MAX_DIMS} sizes of 1 or more and 2**48 elements (SPEC 5.3)"
        )
    return encoding.section_bytes(shape)


def tensor_entry(value: Any) -> TensorEntry:
    """The entry of `TensorEntry.fields`, every claim about it alone checked."""
    entry = as_object("tensor entry", value)
    name = as_text("name of a tensor", entry.get("name"))
    check_tensor_name(name)
    try:  # `error_context` would take a tenth of the time of opening a file
        return _tensor_entry(name, entry)
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from error


def _tensor_entry(name: str, entry: Mapping[str, Any]) -> TensorEntry:
    encoding = encoding_from_fields(entry)
    _check_members(entry, _TENSOR_REQUIRED, _TENSOR_FIELDS | field_names(type(encoding)))
    shape = tuple(as_list("shape", entry["shape"]))
    for size in shape:
        as_integer("shape", size)
    error, transposed = entry.get("relative_error"), entry.get("transposed", False)
    if "relative_error" in entry and type(error) not in (int, float):
        raise FormatError(f"relative_error={brief(error)}: must be a number (SPEC 5.5)")
    if type(transposed) is not bool:
        raise FormatError(f"transposed={brief(transposed)}: must be true or false (SPEC 5.6)")
    offset, n_bytes, sha256 = _place(entry)
    check_tensor(shape, encoding, n_bytes=n_bytes, transposed=transposed, relative_error=error)
    return TensorEntry(name, shape, encoding, offset, n_bytes, sha256, error, transposed)


def _file_entry(value: Any) -> FileEntry:
    entry = as_object("file entry", value)
    name = as_text("name of a file", entry.get("name"))
    check_file_name(name)
    with error_context(f"file {name!r}"):
        _check_members(entry, _SECTION_FIELDS, _SECTION_FIELDS)
        return FileEntry(name, *_place(entry))


def _check_tiling(sections: Iterable[Section], header_offset: int) -> None:
    """SPEC 4.2: no hole, no overlap, nothing behind: a byte of the file has exactly one meaning."""
    wanted = align(PREAMBLE_BYTES, SECTION_ALIGNMENT)
    for section in sections:
        if section.offset_bytes != wanted:
            raise FormatError(f"{section.label}: starts at {section.offset_bytes}, must be {wanted} (SPEC 4.2)")
        wanted = align(section.offset_bytes + section.n_bytes, SECTION_ALIGNMENT)
    if header_offset != wanted:
        raise FormatError(f"starts at {header_offset}, must be {wanted} (SPEC 4.2)")


def _place(entry: Mapping[str, Any]) -> tuple[int, int, str]:
    """Offset and bytes of a section, and what it must hash to."""
    sha256 = entry["sha256"]
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise FormatError(f"sha256={brief(sha256)}: must be 64 lower-case hexadecimal digits (SPEC 4.4)")
    return as_integer("offset", entry["offset"]), as_integer("bytes", entry["bytes"]), sha256


def _check_members(tree: Mapping[str, Any], required: frozenset[str], known: frozenset[str]) -> None:
    if not required <= tree.keys():
        raise FormatError(f"no field {min(required - tree.keys())!r} (SPEC 3.3, 5.1, 6.1)")
    if not tree.keys() <= known:  # refused, so that a misspelt or newer field is never ignored in silence
        raise FormatError(f"unknown field {brief(min(tree.keys() - known))} (SPEC 3.5)")
