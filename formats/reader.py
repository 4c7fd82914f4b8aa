"""Read a `.qtm` file: map it, check its header at once and each section when it is first touched (SPEC 9)."""

from __future__ import annotations

import hashlib
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from formats.encoding import Dense, MatrixEncoding, align
from formats.errors import FormatError, error_context
from formats.header import SECTION_ALIGNMENT, FileEntry, Header, Section, TensorEntry, parse_header
from formats.preamble import PREAMBLE_BYTES, VERSION, read_header_bytes, read_preamble

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from formats.layer import Layer

_PIECE_BYTES = 2**24  # hashed at a time, by each thread
_MAX_THREADS = 4


class QtmFile:
    """A file whose preamble and header have been checked; its sections are read when asked for.

    Views that `section` returned stay valid after `close`: the mapping goes away with the last of them.
    """

    def __init__(self, data: bytes | mmap.mmap, label: str, check: bool = True, descriptor: int | None = None) -> None:
        """descriptor: of the file that is mapped, to see whether it is written to; ours from now on."""
        self.label = label
        self.check = check
        self._descriptor = descriptor
        self._let_go = weakref.finalize(self, lambda: None if descriptor is None else os.close(descriptor))
        self._state = self._file_state()
        self._data = data
        self._view = memoryview(data)
        self._checked: set[str] = set()
        with error_context(label):
            self.version, self.header = _parse(self._view)
        self.tensors: dict[str, TensorEntry] = {entry.name: entry for entry in self.header.tensors}
        self.files: dict[str, FileEntry] = {entry.name: entry for entry in self.header.files}

    @classmethod
    def open(cls, path: str | os.PathLike[str], check: bool = True) -> QtmFile:
        """Map a file; `check=False` leaves out the SHA-256 of sections, never that of the header."""
        with open(path, "rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes < PREAMBLE_BYTES:  # an empty file cannot be mapped at all
                return cls(file.read(PREAMBLE_BYTES), str(path), check)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return cls(mapped, str(path), check, os.dup(file.fileno()))

    def __enter__(self) -> QtmFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapping."""
        self._view.release()
        if isinstance(self._data, mmap.mmap):
            with suppress(BufferError):  # a view is still in use; the mapping ends with it
                self._data.close()
        self._let_go()

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self._view)

    def section(self, entry: Section) -> memoryview:
        """The bytes of a section, a read-only view of the mapping; hashed when first touched (SPEC 9.2)."""
        self.check_unchanged()
        if self.check and entry.label not in self._checked:
            if self._sha256(entry) != entry.sha256:
                raise FormatError(f"{self.label}: {entry.label}: does not match its SHA-256: damaged (SPEC 4.4)")
            self._checked.add(entry.label)
        return self._view[entry.offset_bytes : entry.offset_bytes + entry.n_bytes]

    def check_unchanged(self) -> None:
        """FormatError if the file has been written to since it was opened: what was checked is not what is there."""
        if self._let_go.alive and self._file_state() != self._state:
            raise FormatError(f"{self.label}: was written to while it was in use; load it again")

    def _file_state(self) -> tuple[int, int] | None:
        if self._descriptor is None:
            return None
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns

    def layer(self, name: str) -> Layer:
        """A quantized tensor as a layer; its arrays are copies."""
        from formats.section import unpack  # here, so that to list a file does not import numpy

        entry = self._tensor(name)
        if not isinstance(entry.encoding, MatrixEncoding):
            raise FormatError(f"{self.label}: {entry.label} is {entry.encoding.name}, not a quantized matrix")
        section = self.section(entry)
        with error_context(f"{self.label}: {entry.label}"):
            return unpack(section, entry.shape, entry.encoding)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        """A `dense` tensor in its shape as float32; a copy."""
        from formats.section import dense_to_float32

        entry = self._tensor(name)
        if not isinstance(entry.encoding, Dense):
            raise FormatError(f"{self.label}: {entry.label} is {entry.encoding.name}, not dense")
        return dense_to_float32(self.section(entry), entry.shape, entry.encoding.dtype)

    def read_file(self, name: str) -> bytes:
        """The content of an embedded file."""
        if name not in self.files:
            raise FormatError(f"{self.label}: no file {name!r}")
        return bytes(self.section(self.files[name]))

    def drop_pages(self, start: int = 0, stop: int | None = None) -> None:
        """Give pages read so far back to the system: a caller that streams keeps its memory bounded."""
        if isinstance(self._data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            start -= start % mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, start, (stop or self.n_bytes) - start)

    def _sha256(self, entry: Section) -> str:
        digest, end = hashlib.sha256(), entry.offset_bytes + entry.n_bytes
        for start in range(entry.offset_bytes, end, _PIECE_BYTES):
            digest.update(self._view[start : min(start + _PIECE_BYTES, end)])
            if entry.n_bytes > _PIECE_BYTES:
                self.drop_pages(start, min(start + _PIECE_BYTES, end))
        return digest.hexdigest()

    def check_padding(self) -> None:
        """Refuse a byte between sections that is not zero (SPEC 4.3)."""
        end = PREAMBLE_BYTES
        for section in self.header.sections():
            self._check_gap(end, section.offset_bytes, section.label)
            end = section.offset_bytes + section.n_bytes
        self._check_gap(end, align(end, SECTION_ALIGNMENT), "header")

    def _check_gap(self, start: int, stop: int, label: str) -> None:
        if bytes(self._view[start:stop]).strip(b"\0"):
            raise FormatError(f"{self.label}: {label}: the padding before it is not zero (SPEC 4.3)")

    def _tensor(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise FormatError(f"{self.label}: no tensor {name!r}")
        return self.tensors[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` went over: sections hashed and checked, and the size of the file."""

    n_sections: int
    n_bytes: int


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Check every byte of a file against SPEC.md; FormatError names the section that is not as it must be."""
    with QtmFile.open(Path(path)) as file:
        return verify_file(file)


def verify_file(file: QtmFile) -> VerifyReport:
    """As `verify`, for a file that is open (with `check=True`)."""
    file.check_padding()
    runs = list(_runs(file.header.sections()))
    if len(runs) == 1:  # not worth a thread
        _verify_sections(file, runs[0])
    else:
        _verify_in_threads(file, runs)
    return VerifyReport(n_sections=len(file.tensors) + len(file.files), n_bytes=file.n_bytes)


def _verify_in_threads(file: QtmFile, runs: Sequence[Sequence[Section]]) -> None:
    """Hashing lets go of the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(partial(_verify_sections, file), runs):
            pass  # results come in the file's order, so that the first bad section is the one named


def _runs(sections: Iterable[Section]) -> Iterator[list[Section]]:
    """Neighbours, together large enough to be worth a thread's while."""
    run: list[Section] = []
    n_bytes = 0
    for section in sections:
        run.append(section)
        n_bytes += section.n_bytes
        if n_bytes >= _PIECE_BYTES:
            yield run
            run, n_bytes = [], 0
    yield run


def _verify_sections(file: QtmFile, sections: Sequence[Section]) -> None:
    from formats.section import check_section

    for section in sections:
        data = file.section(section)
        if isinstance(section, TensorEntry):
            with error_context(f"{file.label}: {section.label}"):
                check_section(data, section.shape, section.encoding)
    if sections:
        file.drop_pages(sections[0].offset_bytes, sections[-1].offset_bytes + sections[-1].n_bytes)


def _parse(view: memoryview) -> tuple[tuple[int, int], Header]:
    preamble = read_preamble(view)
    header = read_header_bytes(view, preamble)
    try:
        return preamble.version, parse_header(header, preamble.offset_bytes)
    except FormatError as error:
        if preamble.version <= VERSION:
            raise
        # A newer minor version is read as long as nothing in it is new to us (SPEC 2.3).
        written, known = (".".join(map(str, version)) for version in (preamble.version, VERSION))
        raise FormatError(f"{error}; the file is version {written}, this reader knows {known}") from error
