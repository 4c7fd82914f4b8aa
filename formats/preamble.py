"""The first 64 bytes of a file (SPEC 2): what it is, its version, its header's place and hash."""

import hashlib
import struct
from dataclasses import dataclass

from formats.encoding import Data, Version
from formats.errors import FormatError, error_context

MAGIC = b"\x89QTM\r\n\x1a\n"
VERSION = (1, 3)
"""Of this reader; a file has the lowest that it needs (SPEC 2.3.2)."""
OLDEST_VERSION = (1, 0)
PREAMBLE_BYTES = 64
MAX_HEADER_BYTES = 16 * 2**20

_FIXED = struct.Struct("<8sHH4sQQ")  # the 32 bytes that the digest covers
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Preamble:
    """Version of the format, place of the header, and SHA-256 over the first 32 bytes and the header."""

    version: Version
    offset_bytes: int
    n_bytes: int
    digest: bytes


def build_preamble(header_offset: int, header: bytes, version: Version = OLDEST_VERSION) -> bytes:
    """The 64 bytes for a file of `version` whose header stands at `header_offset`."""
    if len(header) > MAX_HEADER_BYTES:
        raise FormatError(f"header: {len(header)} bytes: at most {MAX_HEADER_BYTES} (SPEC 2.5)")
    fixed = _FIXED.pack(MAGIC, *version, bytes(4), header_offset, len(header))
    return fixed + hashlib.sha256(fixed + header).digest()


def read_preamble(file: Data) -> Preamble:
    """The preamble of a whole file in memory or mapped; every claim is checked against the file's length."""
    with error_context("preamble"):
        return _read_preamble(file)


def read_header_bytes(file: Data, preamble: Preamble) -> bytes:
    """The header's bytes, after its hash has been checked (SPEC 2.6)."""
    header = bytes(file[preamble.offset_bytes : preamble.offset_bytes + preamble.n_bytes])
    if hashlib.sha256(bytes(file[: _FIXED.size]) + header).digest() != preamble.digest:
        raise FormatError("preamble and header do not match their SHA-256: the file is damaged (SPEC 2.6)")
    return header


def _read_preamble(file: Data) -> Preamble:
    if len(file) < PREAMBLE_BYTES:
        raise FormatError(f"the file has {len(file)} bytes, a preamble {PREAMBLE_BYTES}: truncated (SPEC 2.1)")
    magic, major, minor, reserved, offset, n_bytes = _FIXED.unpack_from(file)
    if magic != MAGIC:
        raise FormatError(f"starts with {magic!r}: not a .qtm file (SPEC 2.2)")
    if major != VERSION[0]:
        raise FormatError(
            f"format version {major}.{minor}: this reader reads {VERSION[0]}.x; "
            "use the version of qtool that wrote it, or a newer one (SPEC 2.3)"
        )
    if any(reserved):
        raise FormatError(f"reserved bytes are {reserved.hex()}, must be zero (SPEC 2.4)")
    _check_header_place(offset, n_bytes, len(file))
    digest = bytes(file[_FIXED.size : _FIXED.size + _DIGEST_BYTES])
    return Preamble(version=(major, minor), offset_bytes=offset, n_bytes=n_bytes, digest=digest)


def _check_header_place(offset: int, n_bytes: int, file_bytes: int) -> None:
    if n_bytes > MAX_HEADER_BYTES:
        raise FormatError(f"the header claims {n_bytes} bytes: at most {MAX_HEADER_BYTES} (SPEC 2.5)")
    if offset < PREAMBLE_BYTES or offset + n_bytes != file_bytes:
        raise FormatError(
            f"the header claims bytes {offset} to {offset + n_bytes}, the file has {file_bytes}: "
            "truncated, or something was appended (SPEC 2.5)"
        )
