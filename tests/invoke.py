"""Run qtool's command line in this process, and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from qtool.cli import main

ROOT = Path(__file__).parents[1]


def run_qtool(*args: object) -> Result:
    """The result of `qtool ARGS`: exit_code, stdout, stderr."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def qtool_json(*args: object) -> dict[str, Any]:
    """What `qtool ARGS --json` prints; the run has to succeed."""
    result = run_qtool(*args, "--json")
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def refusal(*args: object) -> str:
    """The one line on stderr that `qtool ARGS` ends with, without its `Error: `."""
    result = run_qtool(*args)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == "", result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def python(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python ARGS` in its own process, with this checkout on its path and whatever the caller sets."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, **options)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
