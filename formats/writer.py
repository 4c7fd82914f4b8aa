"""Write a `.qtm` file in one pass, section by section, so that it appears complete or not at all (SPEC 8)."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.encoding import Encoding, Shape, align
from formats.errors import FormatError, error_context
from formats.header import (
    SECTION_ALIGNMENT,
    FileEntry,
    Header,
    TensorEntry,
    check_file_name,
    check_tensor,
    check_tensor_name,
    parse_header,
    serialise_header,
)
from formats.preamble import PREAMBLE_BYTES, build_preamble

BytesLike: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.generic]


class Writer:
    """Context manager for one new file.

    Bytes go to `.NAME.part-*` beside the target and get their name in `finish`. Leaving the context before
    that, for whatever reason, removes them. Only a process killed outright leaves such a file behind.

    With `part`, bytes go to that file instead and stay there until `finish`: a caller that remembers the entries of
    what it has made durable by `sync` hands them to the next Writer as `written`, which goes on behind them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        part: Path | None = None,
        written: Sequence[TensorEntry] = (),
    ) -> None:
        self.path = Path(path)
        self.overwrite = overwrite
        self._keep = part is not None
        beside = self.path.with_name(f".{self.path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
        self._part = part or beside
        self._file: BinaryIO | None = None
        # End of what is complete: a section that failed is written over.
        self._end = max([PREAMBLE_BYTES, *(entry.offset_bytes + entry.n_bytes for entry in written)])
        self._tensors = {entry.name: entry for entry in written}
        self._files: dict[str, FileEntry] = {}

    def __enter__(self) -> "Writer":
        self._check_target()
        if not self._keep:
            self._file = open(self._part, "xb")
        else:
            self._file = open(self._part, "r+b" if self._tensors else "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
        finally:
            if not self._keep:
                self._part.unlink(missing_ok=True)

    @property
    def bytes_written(self) -> int:
        """Bytes of the file so far; its size once it is finished."""
        return self._end

    def add_tensor(
        self,
        name: str,
        shape: Shape,
        encoding: Encoding,
        data: BytesLike | Iterable[BytesLike],
        *,
        transposed: bool = False,
        relative_error: float | None = None,
    ) -> TensorEntry:
        """Append a tensor's section; `data` is the whole section or its pieces in order."""
        check_tensor_name(name)
        shape, error = tuple(int(size) for size in shape), relative_error
        error = None if error is None else float(error)
        with error_context(f"tensor {name!r}"):
            if name in self._tensors:
                raise FormatError("the name stands twice (SPEC 5.2)")
            n_bytes = encoding.section_bytes(shape)
            check_tensor(shape, encoding, n_bytes=n_bytes, transposed=transposed, relative_error=error)
            offset, _, sha256 = self._append(data, n_bytes)
        entry = TensorEntry(
            name=name,
            shape=shape,
            encoding=encoding,
            offset_bytes=offset,
            n_bytes=n_bytes,
            sha256=sha256,
            relative_error=error,
            transposed=transposed,
        )
        self._tensors[name] = entry
        return entry

    def add_file(self, name: str, data: BytesLike | Iterable[BytesLike]) -> FileEntry:
        """Append an embedded file's section."""
        check_file_name(name)
        with error_context(f"file {name!r}"):
            if name in self._files:
                raise FormatError("the name stands twice (SPEC 6.2)")
            offset, n_bytes, sha256 = self._append(data, None)
        entry = FileEntry(name=name, offset_bytes=offset, n_bytes=n_bytes, sha256=sha256)
        self._files[name] = entry
        return entry

    def sync(self) -> None:
        """Make what has been added so far durable."""
        file = self._open_file()
        file.flush()
        os.fsync(file.fileno())

    def finish(
        self,
        *,
        model: Mapping[str, Any],
        recipe: Mapping[str, Any],
        provenance: Mapping[str, Any],
        quality: Mapping[str, Any],
    ) -> Header:
        """Write header and preamble, make the bytes durable and give the file its name."""
        file = self._open_file()
        offset = align(self._end, SECTION_ALIGNMENT)
        header = Header(
            tensors=tuple(self._tensors.values()),
            files=tuple(self._files.values()),
            model=model,
            recipe=recipe,
            provenance=provenance,
            quality=quality,
        )
        data = serialise_header(header)
        header = parse_header(data, offset)  # what a reader would refuse is never given the final name
        preamble = build_preamble(offset, data, header.version)
        self._seek_to_end(file)
        file.write(data)
        file.truncate()
        file.seek(0)
        file.write(preamble)
        self.sync()
        self._publish()
        self._end = offset + len(data)
        return header

    def _append(self, data: BytesLike | Iterable[BytesLike], n_bytes: int | None) -> tuple[int, int, str]:
        """Write one section of `n_bytes` (None: as many as come).  -> offset, bytes, SHA-256"""
        file = self._open_file()
        offset = self._seek_to_end(file)
        digest, total = hashlib.sha256(), 0
        for chunk in _chunks(data):
            total += len(chunk)
            if n_bytes is not None and total > n_bytes:
                raise FormatError(f"data has more than the {n_bytes} bytes of its shape (SPEC 5.4)")
            digest.update(chunk)
            file.write(chunk)
        if n_bytes is not None and total != n_bytes:
            raise FormatError(f"data has {total} bytes, its shape takes {n_bytes} (SPEC 5.4)")
        self._end = offset + total
        return offset, total, digest.hexdigest()

    def _seek_to_end(self, file: BinaryIO) -> int:
        """Zero padding up to where the next section starts; leaves the file there."""
        offset = align(self._end, SECTION_ALIGNMENT)
        file.seek(self._end)
        file.write(bytes(offset - self._end))
        return offset

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise FormatError(f"{self.path}: the writer is not open; use it as a context manager, once")
        return self._file

    def _check_target(self) -> None:
        if not self.overwrite and os.path.lexists(self.path):
            raise FormatError(f"{self.path}: exists already; nothing was written (SPEC 8.3)")

    def _publish(self) -> None:
        """Give the complete file its name; a reader that has the old file mapped keeps it."""
        self._open_file().close()
        try:
            self._give_name(self._part)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._copy_over()
        self._file = None
        sync_folder(self.path.parent)

    def _copy_over(self) -> None:
        """Publish a part that lies on another file system: a name cannot be given across."""
        copy = self.path.with_name(f".{self.path.name}.part")  # one name: what a killed run left is written over
        try:
            shutil.copyfile(self._part, copy)
            with open(copy, "rb+") as file:
                os.fsync(file.fileno())
            self._give_name(copy)
        finally:
            copy.unlink(missing_ok=True)
        sync_folder(self.path.parent)  # before the only other copy goes: file systems keep no order between them
        self._part.unlink()

    def _give_name(self, part: Path) -> None:
        if self.overwrite:
            os.replace(part, self.path)
        else:
            self._link(part)

    def _link(self, part: Path) -> None:
        """Unlike a rename, a link fails when another process made the target meanwhile."""
        try:
            os.link(part, self.path)
        except FileExistsError as error:
            raise FormatError(f"{self.path}: exists already; it was left as it is (SPEC 8.3)") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            # A file system without hard links, such as exFAT: check again as late as possible, then rename.
            self._check_target()
            os.replace(part, self.path)
        else:
            part.unlink()


def _chunks(data: BytesLike | Iterable[BytesLike]) -> Iterator[memoryview]:
    try:
        yield memoryview(data).cast("B")  # type: ignore[arg-type]
    except TypeError:
        if isinstance(data, np.ndarray):  # not contiguous: its rows are not its bytes
            raise
        for chunk in data:
            yield memoryview(chunk).cast("B")  # type: ignore[arg-type]


def sync_folder(folder: Path) -> None:
    """Make the new name itself durable, not only the bytes behind it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
