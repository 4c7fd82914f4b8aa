"""The work folder of a run, from which the same command goes on after whatever stopped it.

    manifest.json   everything that decides the result: another run's journal is never gone on with
    journal.jsonl   one line for each finished step: its tensors and its part of the report
    sections        the file so far, as formats.writer writes it
    states.*        the hidden states that the next block reads (qtool.states)
    self.*.npy      the sample that the model wrote itself, if it did
    sweep.json      what each layer loses at each width, for a target; it stays when the run is over, for another one
    sweep.part.json, sweep.0, sweep.1: that, while it is measured, and the hidden states that the next block reads
    forward.*, gradient.*: every block's input, and the gradients there, for what an error costs

A step is finished once its line is on the disk, and the line is written after everything that it speaks of.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

from calibration.errors import CalibrationError
from formats.errors import FormatError
from formats.header import TensorEntry, tensor_entry
from formats.reader import QtmFile
from formats.writer import sync_folder
from qtool.errors import CheckpointError, ConfigError, QuantizeError, naming
from qtool.lock import locked_folder, locked_output
from qtool.states import EXPERT_FILES, STATES_FILES

MANIFEST, LINES, SECTIONS = "manifest.json", "journal.jsonl", "sections"
SWEEP, SWEEP_PART, SWEEP_STATES = "sweep.json", "sweep.part.json", ("sweep.0", "sweep.1")
FORWARD, GRADIENT = "forward.", "gradient."
_FILES = (
    *EXPERT_FILES,
    *STATES_FILES,
    SECTIONS,
    LINES,
    f"{MANIFEST}.new",
    MANIFEST,
)  # in the order in which they are removed
_MEASURING = (
    SWEEP_PART, f"{SWEEP_PART}.new", f"{SWEEP}.new", *SWEEP_STATES, f"{FORWARD}[0-9]*", f"{GRADIENT}[0-9]*"
)  # fmt: skip
SPREAD_BITS = "bits"  # in a run's identity: what a target gave every layer
_SAMPLES = "self.*.npy*"
_OWN_ERRORS = (CheckpointError, QuantizeError, CalibrationError, FormatError)
_DIGITS = 16  # of the SHA-256 before each line
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """What lies outside the blocks, or one block: its tensors, and what it adds to the report."""

    tensors: tuple[TensorEntry, ...]
    report: dict[str, Any]


class Journal:
    """Context manager: holds the output and the folder, and leaves the folder only if a run can go on from it."""

    def __init__(self, output: Path, folder: Path | None = None) -> None:
        self.output = output
        self.folder = folder or default_folder(output)
        self.sections = self.folder / SECTIONS
        self.steps: list[Step] = []
        self._identity: Mapping[str, Any] | None = None
        self._n_steps = 0
        self._is_new = self._hopeless = False
        self._locks = ExitStack()

    def __enter__(self) -> Journal:
        with ExitStack() as stack:
            stack.enter_context(locked_output(self.output))
            self.folder.mkdir(exist_ok=True)
            stack.enter_context(locked_folder(self.folder))
            self._refuse_foreign_files()
            self._locks = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._locks:
            if error is None or self._hopeless or not (self.folder / SWEEP_PART).exists():
                self.clear_measuring()
            if self._hopeless and self._manifest() is None:  # not even a sample is of use
                self._clear()
            if error is not None and self._identity and not self._hopeless and (self.steps or self.sample.exists()):
                error.add_note(f"{self.progress} are kept in {self.folder}, the same command goes on from there")
                return
            if error is not None and (self.folder / SWEEP_PART).exists():
                error.add_note(f"what was measured is kept in {self.folder}, the same command goes on from there")
            if self._identity and not self._is_new:
                self._clear()
            with suppress(OSError):  # another run's files may be in it, and a mount point stays
                self.folder.rmdir()

    def begin(self, identity: Mapping[str, Any], n_steps: int, *, restart: bool = False) -> None:
        """Find what there is to go on with; nothing is changed yet. ConfigError when it is another run's."""
        self._n_steps, self.steps = n_steps, self._read_lines()
        if restart or self._manifest() != identity:
            if not restart:
                self._refuse_other(identity)
            self.steps, self._is_new = [], True
        self._identity = identity

    def refuse_other(self, identity: Mapping[str, Any], n_steps: int) -> None:
        """The same ConfigError before a target's bits are known, which takes long."""
        self._n_steps, self.steps = n_steps, self._read_lines()
        self._refuse_other(_before_spread(identity))

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        known = self._manifest()
        if known is not None and SPREAD_BITS not in identity:
            known = _before_spread(known)
        if known not in (None, identity) and (self.steps or any(self.folder.glob(_SAMPLES))):
            raise self._other_run(_difference(known, identity))

    def start(self) -> None:
        """From here on the folder is this run's: what another one left goes."""
        if not self._is_new:
            return
        self._clear(keep=self.sample)
        self._is_new = False
        sync_folder(self.folder.parent)
        write_durably(self.folder / MANIFEST, json.dumps(self._identity, indent=1).encode())

    @property
    def sample(self) -> Path:
        """Where a sample that the model wrote itself is kept: it is this run's alone."""
        return self.sample_of(self._identity or {})

    def sample_of(self, identity: Mapping[str, Any]) -> Path:
        """The same, for a run that has yet to begin: the bits that a target spreads follow from the sample."""
        return self.folder / f"self.{_check(json.dumps(_before_spread(identity)))}.npy"

    @property
    def entries(self) -> list[TensorEntry]:
        """The tensors of all finished steps."""
        return [entry for step in self.steps for entry in step.tensors]

    @property
    def reports(self) -> Iterator[dict[str, Any]]:
        """What each finished step has to report."""
        return (step.report for step in self.steps)

    @property
    def is_published(self) -> bool:
        """Whether the run came to its end and was killed between naming the file and removing the folder."""
        if len(self.steps) < self._n_steps:
            return False
        with suppress(FormatError, OSError), QtmFile.open(self.output) as file:
            return list(file.tensors.values()) == self.entries
        return False

    def check(self) -> None:
        """Refuse to go on from sections that are not what was journalled: a disk can lose what it promised."""
        if len(self.steps) == self._n_steps and not self.sections.exists():
            raise ConfigError(f"{self.folder}: its file was finished, and moved away; give --restart to make it again")
        with suppress(FileNotFoundError), open(self.sections, "rb") as file:
            if all(_sha256(file, entry) == entry.sha256 for entry in self.entries):
                return
        raise ConfigError(f"{self.sections}: damaged; give --restart to begin anew")

    def check_same(self, what: str, now: Any) -> None:
        """Refuse to go on when `what`, in the first step's report, is not what it is now."""
        if self.steps and self.steps[0].report[what] != now:
            raise self._other_run(f"{what} is {now}, was {self.steps[0].report[what]}")

    def commit(self, tensors: Sequence[TensorEntry], report: Mapping[str, Any]) -> None:
        """Note that a step is finished; all it wrote has to be durable already."""
        step = Step(tuple(tensors), dict(report))
        text = json.dumps({"tensors": [entry.fields() for entry in tensors], "report": step.report})
        path = self.folder / LINES
        path.touch()
        sync_folder(self.folder)  # the names of all it speaks of, and its own
        with naming(path), open(path, "ab") as file:
            file.write(f"{_check(text)} {text}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.steps.append(step)

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Keep nothing of a run that meets what it would meet again: a broken weight, a layer that cannot be solved.

        Whatever else is behind an error (a disk, a network, memory) may do better next time.
        """
        try:
            yield
        except _OWN_ERRORS as error:
            cause: BaseException | None = error
            while isinstance(cause, _OWN_ERRORS):
                cause = cause.__cause__
            self._hopeless = cause is None
            raise

    @property
    def progress(self) -> str:
        return f"{max(len(self.steps) - 1, 0)} of {self._n_steps - 1} blocks"

    def _other_run(self, difference: str) -> ConfigError:
        return ConfigError(
            f"{self.folder}: holds another run ({difference}); run that one to its end, "
            "give --restart to drop it, or another --work-dir"
        )

    def _refuse_foreign_files(self) -> None:
        for path in self.folder.iterdir():
            if not _is_one_of(path.name, (*_FILES, SWEEP, *_MEASURING, _SAMPLES)):
                raise ConfigError(f"{self.folder}: has {path.name!r} in it, which is no run's; give a new --work-dir")

    def _manifest(self) -> Any:
        """The identity of the run in the folder; None when there is none, or none that got as far as a manifest."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return None

    def _read_lines(self) -> list[Step]:
        """The steps of all whole lines; what a crash left behind them is cut off."""
        path = self.folder / LINES
        if not path.exists():
            return []
        steps, end = [], 0
        for line, step in _whole_lines(path.read_bytes()):
            steps.append(step)
            end += len(line)
        os.truncate(path, end)
        return steps

    def clear_measuring(self) -> None:
        """What was measured to the end stays; a part of it, and what it took, which is large, does not."""
        for pattern in _MEASURING:
            for path in self.folder.glob(pattern):
                path.unlink()

    def _clear(self, keep: Path | None = None) -> None:
        for path in (*self.folder.glob(_SAMPLES), *(self.folder / name for name in _FILES)):
            if path != keep:
                path.unlink(missing_ok=True)


def _before_spread(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a run before its target has been spread over the layers."""
    return {name: value for name, value in identity.items() if name != SPREAD_BITS}


def is_unfinished(folder: Path) -> bool:
    """Whether a run may have left something to go on with, or an empty folder to remove."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {SWEEP}
    return not names or not all(_is_one_of(name, (SWEEP, *_MEASURING)) for name in names)


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def default_folder(output: Path) -> Path:
    """The work folder of a run that was given none: beside its output."""
    return output.with_name(f"{output.name}.work")


def _whole_lines(data: bytes) -> Iterator[tuple[bytes, Step]]:
    for line in data.splitlines(keepends=True):
        check, _, text = line.decode("utf-8", "replace").rstrip("\n").partition(" ")
        if not line.endswith(b"\n") or check != _check(text):
            return
        values = json.loads(text)
        yield line, Step(tuple(map(tensor_entry, values["tensors"])), values["report"])


def _check(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _sha256(file: Any, entry: TensorEntry) -> str:
    digest, left = hashlib.sha256(), entry.n_bytes
    file.seek(entry.offset_bytes)
    while chunk := file.read(min(left, _CHUNK_BYTES)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """All of it under `path`, or nothing."""
    new = path.with_name(f"{path.name}.new")
    with naming(new), open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)


def _difference(known: Any, now: Any, name: str = "") -> str:
    """Where two identities first differ, in words."""
    if isinstance(known, dict) and isinstance(now, dict):
        for key in sorted(known.keys() | now.keys()):
            if known.get(key) != now.get(key):
                return _difference(known.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    return f"{name} is {_short(now)}, was {_short(known)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
