"""What the benchmarks share: the reference model, the command line in a process of its own, tables."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
CALIBRATION = ["--samples", "32", "--seq-len", "1024"]
MEASURE = ["--seq-len", "1024", "--max-windows", "16"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that name the model and the texts; by default the reference model and the texts beside the repo."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", type=Path, default=Path("build/reference-0"), help="Hugging Face folder to compress")
    made.add_argument("--calibration", type=Path, default=SHARED / "data/c4-sample.txt")
    made.add_argument("--data", type=Path, default=SHARED / "data/wikitext2-test.txt")
    made.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for what the benchmark writes")
    return made


def qtool(*arguments: object) -> dict[str, Any]:
    """The JSON result of one qtool command, run in a process of its own."""
    command = [sys.executable, "-m", "qtool.cli", *map(str, arguments), "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(finished.stdout))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for index, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


class Limits:
    """What the project promises: every figure that breaks its promise is named, and the script fails."""

    def __init__(self) -> None:
        self._broken: list[str] = []

    def at_most(self, what: str, value: float, limit: float) -> str:
        """The limit as a table cell; remembers `what` when `value` is above it."""
        if value > limit:
            self._broken.append(f"{what}: {value:.4g} is above {limit:g}")
        return f"{limit:g}"

    def at_least(self, what: str, value: float, limit: float) -> str:
        """The same of a limit from below."""
        if value < limit:
            self._broken.append(f"{what}: {value:.4g} is below {limit:g}")
        return f"{limit:g}"

    def finish(self) -> None:
        if self._broken:
            sys.exit("\n".join(self._broken))
