"""Tiny models, their compressed files and a text: made when first asked for, shared by all tests, only read."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: threads only slow tiny matrices down
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # and wait for each other where a machine is busy
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run without a GPU; `make test-gpu` says 0

from invoke import run_qtool
from targeting import FAST, MEASURED
from tiny import WIDE, make_model, silence

WORDS = ["the", "of", "and", "in", "is", "it", "with", "for", "was", "that", "from", "not", "be", "one", "what", "when"]
SMALL = ("--samples", "4", "--seq-len", "64", "--group-size", "16")


class TinyFiles:
    """What the tests start from, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = random.Random(0)
        self.text = folder / "text.txt"
        self.text.write_text(" ".join(rng.choices(WORDS, k=500)) + ".\n", encoding="utf-8")
        self.model = cache(self._model)
        self.compressed = cache(self._compressed)
        self.wide_model = cache(self._wide_model)
        self.wide = cache(self._wide)

    def compress_options(self, *options: str) -> tuple[str, ...]:
        """Options of a compress run that takes a fraction of a second; later ones win."""
        return (*SMALL, "--calibration", str(self.text), *options)

    def _model(self, family: str) -> Path:
        return make_model(family, self.folder / family)

    def _compressed(self, family: str, *options: str) -> Path:
        return self._compress(self.model(family), *options)

    def _wide_model(self, family: str) -> Path:
        return make_model(family, self.folder / f"{family}-wide", sizes=WIDE[family])

    def _wide(self, family: str, *options: str) -> Path:
        """Compressed so that other engines can hold it: shapes of whole words, no input scales, groups of 32."""
        return self._compress(self.wide_model(family), "--no-input-scales", "--group-size", "32", *options)

    def _compress(self, model: Path, *options: str) -> Path:
        output = self.folder / f"{model.name}{''.join(options).replace('/', '')}.qtm"
        result = run_qtool("compress", model, "-o", output, *self.compress_options(*options))
        assert result.exit_code == 0, result.output
        return output


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    silence()
    return TinyFiles(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A place of its own: whatever else lies in it afterwards was left behind."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder / "out.qtm"


@pytest.fixture
def command(tiny_files: TinyFiles, output: Path) -> list[object]:
    """A compress run of a fraction of a second."""
    return ["compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options()]


@pytest.fixture
def whole(tiny_files: TinyFiles) -> bytes:
    """The bytes that `command` gives in one go."""
    return tiny_files.compressed("llama").read_bytes()


@pytest.fixture(scope="session")
def measured(tiny_files: TinyFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the options FAST measure on the llama, as a dry run leaves it."""
    output = tmp_path_factory.mktemp("measured") / "out.qtm"
    command = ["compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options(*FAST)]
    result = run_qtool(*command, "--target-size", "60kB", "--dry-run")
    assert result.exit_code == 0 and MEASURED not in result.stderr, result.output
    work = output.with_name("out.qtm.work")
    assert os.listdir(work) == ["sweep.json"]
    return work / "sweep.json"


@pytest.fixture
def fresh(command: list[object]) -> list[object]:
    """A command to which a target can be added; nothing is measured for it yet."""
    return [*command, *FAST]


@pytest.fixture
def targeted(fresh: list[object], output: Path, measured: Path) -> list[object]:
    """The same, with all measured that it asks for."""
    work = output.with_name(f"{output.name}.work")
    work.mkdir()
    shutil.copy(measured, work)
    return fresh


@pytest.fixture
def in_one_go(tiny_files: TinyFiles, measured: Path, tmp_path: Path) -> Callable[..., bytes]:
    """The bytes that a target gives when nothing stops its run."""

    def compress(*options: str) -> bytes:
        shutil.copytree(measured.parent, tmp_path / "work")
        output = tmp_path / "whole.qtm"
        base = ["compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options(*FAST)]
        assert run_qtool(*base, *options, "--work-dir", tmp_path / "work").exit_code == 0
        return output.read_bytes()

    return compress
