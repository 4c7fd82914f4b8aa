"""A lock that dies with its process, so that a killed run never blocks the next one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.errors import ConfigError


@contextmanager
def locked_output(output: Path) -> Iterator[None]:
    """Hold `output` against every other process that would write it; its lock is a file beside it."""
    path = output.with_name(f".{output.name}.lock")
    descriptor = _take(path, output)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever waits for this file sees that it is gone
        os.close(descriptor)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold an existing folder against every other process that would work in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _flock(descriptor, f"{folder}: another qtool is working in it; wait for it, or give another --work-dir")
        yield
    finally:
        os.close(descriptor)


def _take(path: Path, output: Path) -> int:
    """The open, locked file `path`; ConfigError when another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            who = f"another qtool (process {holder})" if holder.isdigit() else "another qtool"
            _flock(descriptor, f"{output}: {who} is writing it; wait for it, or give another --output")
            if _is_still_there(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder finished and removed it between our two calls


def _flock(descriptor: int, refusal: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(refusal) from error


def _is_still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
