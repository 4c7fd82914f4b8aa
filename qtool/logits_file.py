"""A baseline's log-probabilities on disk: written once, then compared with as often as one likes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from formats.strict_json import brief
from formats.writer import sync_folder
from qtool.errors import ConfigError, naming
from qtool.figures import Predictions
from qtool.logits_layout import (
    COLUMNS,
    FORMAT,
    NO_SHA256,
    build_header,
    column_bytes,
    data_bytes,
    decode,
    encode,
    metadata_of,
    tensors_of,
)
from qtool.protocol import Sample
from qtool.sizes import format_bytes

MAX_HEADER_BYTES = 1 << 16
AGAIN = "save the baseline again"
MUST_AGREE = {  # in this order, since what comes later follows from what comes before
    "data_sha256": ("text, by its SHA-256,", "give the same --data"),
    "protocol": ("protocol", "give the same --protocol"),
    "seq_len": ("window length", "give the same --seq-len"),
    "stride": ("stride", "give the same --stride"),
    "windows": ("number of windows", "give the same --max-windows"),
    "vocab_size": ("vocabulary", "it is of another model"),
    "encoder_tokens": ("number of tokens for an encoder", "it is of another model"),
    "bos": ("place of BOS", "it is of another model, or its tokenizer was"),
    "tokens_sha256": ("row of tokens, by its SHA-256,", "it is of another model, or its tokenizer was"),
}


class BaselineWriter:
    """Context manager for one new file, which has its name once `finish` is done; leaving before that removes it."""

    def __init__(self, path: Path, sample: Sample, vocab_size: int) -> None:
        self.path = path
        self._sample, self._vocab_size = sample, vocab_size
        self._part = path.with_name(f".{path.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
        self._columns = {name: np.empty(sample.tokens, kind) for name, kind in COLUMNS.items()}
        self._n_written = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> BaselineWriter:
        header = build_header(self._sample, self._vocab_size, NO_SHA256)
        self._check_target(len(header) + data_bytes(self._sample.tokens, self._vocab_size))
        with naming(self.path):
            self._file = open(self._part, "xb")
            self._file.seek(len(header) + column_bytes(self._sample.tokens))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._part.unlink(missing_ok=True)

    def write(self, rows: Predictions) -> None:
        """The next rows."""
        codes, low, step = encode(rows.log_probs)
        raw = codes.tobytes()
        with naming(self.path):
            self._file.write(raw)
        self._digest.update(raw)
        done = slice(self._n_written, self._n_written + len(codes))
        for name, values in {"low": low, "step": step, "nll": rows.nll, "top": rows.top}.items():
            self._columns[name][done] = values.numpy()
        self._n_written = done.stop

    def finish(self) -> None:
        """Complete the file, make it durable and give it its name."""
        columns = b"".join(values.tobytes() for values in self._columns.values())
        self._digest.update(columns)
        with naming(self.path):
            self._file.seek(0)
            self._file.write(build_header(self._sample, self._vocab_size, self._digest.hexdigest()) + columns)
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._part, self.path)
            sync_folder(self.path.parent)

    def _check_target(self, needed: int) -> None:
        if os.path.lexists(self.path):
            raise ConfigError(
                f"--save-baseline {self.path}: exists already; use it by --baseline-logits, or give another name"
            )
        if not self.path.parent.is_dir():
            raise ConfigError(f"--save-baseline {self.path}: its folder does not exist; make it first")
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise ConfigError(
                f"--save-baseline {self.path}: takes {format_bytes(needed)}, {format_bytes(free)} are free there; "
                "make room, or give a smaller --max-windows"
            )


class SavedBaseline:
    """Context manager that reads what BaselineWriter wrote, some rows at a time; refuses what is of something else.

    Nothing in the file is trusted: its header has to be the one that this run would write, and its bytes have to have
    the SHA-256 in it, which is known when the last row was read.
    """

    def __init__(self, path: Path, sample: Sample, vocab_size: int) -> None:
        self.path = path
        self._sample, self._vocab_size = sample, vocab_size
        self._digest = hashlib.sha256()
        self._n_read = 0
        self._buffer = bytearray()  # one for all reads

    def __enter__(self) -> SavedBaseline:
        self._file = open(self.path, "rb")
        try:
            self._sha256 = self._check_header()
            self._raw = bytearray(self._take(column_bytes(self._sample.tokens)))
            self._columns = self._split_columns()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, n_rows: int) -> Predictions:
        """The next `n_rows` rows."""
        raw = self._take(2 * n_rows * self._vocab_size)
        self._digest.update(raw)
        rows = slice(self._n_read, self._n_read + n_rows)
        self._n_read += n_rows
        if self._n_read == self._sample.tokens:
            self._digest.update(self._raw)
            if self._digest.hexdigest() != self._sha256:
                raise self._damaged()
        column = {name: torch.from_numpy(values[rows]) for name, values in self._columns.items()}
        codes = np.frombuffer(raw, "<u2").reshape(n_rows, self._vocab_size)
        return Predictions(decode(codes, column["low"], column["step"]), column["nll"], column["top"].long())

    def _check_header(self) -> str:
        """Read up to the data.  -> the SHA-256 it is said to have"""
        header = self._header_json()
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise self._foreign()
        self._compare(metadata)
        if header != tensors_of(self._sample.tokens, self._vocab_size):
            raise self._foreign()
        expected = self._file.tell() + data_bytes(self._sample.tokens, self._vocab_size)
        size = os.fstat(self._file.fileno()).st_size
        if size != expected:
            raise ConfigError(f"{self.path}: has {size} bytes, not the {expected} of its header; {AGAIN}")
        return str(metadata.get("sha256"))

    def _compare(self, theirs: dict[str, Any]) -> None:
        ours = metadata_of(self._sample, self._vocab_size)
        for key, (what, fix) in MUST_AGREE.items():
            if theirs.get(key) != ours.get(key):
                value = theirs.get(key)
                value = value if isinstance(value, str) and value.isprintable() else brief(value)
                raise ConfigError(f"{self.path}: its {what} is {value[:80]}, this run's is {ours.get(key)}; {fix}")

    def _header_json(self) -> dict[str, Any]:
        length = self._file.read(8)
        n_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        if not 2 <= n_bytes <= MAX_HEADER_BYTES:
            raise self._foreign()
        try:
            header = json.loads(self._file.read(n_bytes))
        except (ValueError, RecursionError) as error:
            raise self._foreign() from error
        if not isinstance(header, dict):
            raise self._foreign()
        return header

    def _split_columns(self) -> dict[str, npt.NDArray[Any]]:
        n = self._sample.tokens
        starts = range(0, 4 * n * len(COLUMNS), 4 * n)
        kinds = zip(COLUMNS.items(), starts, strict=True)
        return {name: np.frombuffer(self._raw, kind, n, start) for (name, kind), start in kinds}

    def _take(self, n_bytes: int) -> memoryview:
        """The next bytes, until the next call."""
        if len(self._buffer) < n_bytes:
            self._buffer = bytearray(n_bytes)
        data = memoryview(self._buffer)[:n_bytes]
        if self._file.readinto(data) != n_bytes:  # cut while it was being read
            raise self._damaged()
        return data

    def _foreign(self) -> ConfigError:
        return ConfigError(f"{self.path}: not a file that --save-baseline of this version wrote; {AGAIN}")

    def _damaged(self) -> ConfigError:
        return ConfigError(f"{self.path}: damaged, its bytes are not those of its SHA-256; {AGAIN}")
