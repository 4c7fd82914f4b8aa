"""A virtual environment for each peer, made once and again when its list of packages changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.settings import PACKAGES, VARIABLES

ROOT = Path(__file__).parents[2]


class PeerError(Exception):
    """A peer that cannot be installed or does not finish; the message is one line for the table."""


def interpreter(module: str, folder: Path) -> Path:
    """The Python of the environment for `module`, in `folder`; installs its pinned packages first."""
    home = folder / module
    python, stamp, packages = home / "bin/python", home / "installed.txt", "\n".join(PACKAGES[module])
    if stamp.exists() and stamp.read_text() == packages:
        return python
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    install = [python, "-m", "pip", "install", "--progress-bar", "off", *PACKAGES[module]]
    run_logged(module, install, home / "install.log")
    stamp.write_text(packages)
    return python


def run_logged(module: str, command: Sequence[object], log: Path) -> None:
    """Run `command` for a peer's module beside `log`, where what it leaves behind is thrown away with the rest.

    Raises `PeerError` with the last line of what it printed, which all goes to `log`.
    """
    with log.open("wb") as sink:
        finished = subprocess.run(
            [str(part) for part in command],
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, **VARIABLES.get(module, {}), "PYTHONPATH": str(ROOT)},
        )
    if finished.returncode != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise PeerError(lines[-1] if lines else f"exit status {finished.returncode}, without a word")
