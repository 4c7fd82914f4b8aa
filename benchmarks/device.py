"""All that needs a GPU, in one go of under eight minutes: tests, whole models, times. Prints lines of JSON.

    python -m benchmarks.device [--seconds 440]

Made to be run once, by nobody: every step has its time and fails alone, and what was found until then stands. The
kernels' tests are cut into parts that run side by side, for they mostly wait for compilers. Says why and does nothing
where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PARTS = {"tests/test_gpu.py": 8, "tests/formats/test_kernels_triton.py": 10}
LAST_LINES = 12
SHARES = {"tests": 0.5, "times": 0.5}  # of the seconds
TOKENS = "1", "4", "16", "64", "256", "2048"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=440)
    options.add_argument("--steps", nargs="+", choices=SHARES, default=list(SHARES))
    args = options.parse_args()
    if not torch.cuda.is_available():
        say({"skipped": "torch finds no GPU here"})
        return
    say({"step": "environment", **environment()})
    share = args.seconds / sum(SHARES[step] for step in args.steps)
    good = True
    if "tests" in args.steps:
        parts = [ids[i :: PARTS[path]] for path in PARTS for ids in [collected(path)] for i in range(PARTS[path])]
        if not all(parts):
            good = False
            say({"step": "tests", "rc": None, "last": "a file has too few tests"})
        good &= run("tests", [tests(ids) for ids in parts if ids], share * SHARES["tests"])
    if "times" in args.steps:
        seconds = share * SHARES["times"]
        times = [sys.executable, "-m", "benchmarks.gpu", "--json", "--seconds", f"{0.8 * seconds:.0f}"]
        good &= run("times", [[*times, "--tokens", *TOKENS]], seconds)
    sys.exit(0 if good else 1)


def environment() -> dict[str, object]:
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def tests(ids: Sequence[str]) -> list[str]:
    """The command that runs these. Other versions than ours may warn: that fails no test here."""
    return [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-W", "default", *ids]


def collected(path: str) -> list[str]:
    """The tests in a file."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-W", "default", path]
    done = subprocess.run(command, cwd=ROOT, env=with_gpu(), capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if line.startswith(f"{path}::")]


def run(step: str, commands: Sequence[Sequence[str]], seconds: float) -> bool:
    """Run commands side by side, and say how each ended; lines of JSON that one printed are passed on."""
    started, good = time.perf_counter(), True
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]  # a full pipe would stop them
        running = [
            subprocess.Popen(command, cwd=ROOT, env=with_gpu(), stdout=output, stderr=subprocess.STDOUT)
            for command, output in zip(commands, outputs, strict=True)
        ]
        for index, (process, output) in enumerate(zip(running, outputs, strict=True)):
            try:
                process.wait(max(seconds - (time.perf_counter() - started), 1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            good &= process.returncode == 0
            took = round(time.perf_counter() - started, 1)
            output.seek(0)
            report({"step": step, "part": index, "rc": process.returncode, "seconds": took}, output.read().splitlines())
    return good


def report(row: dict[str, object], lines: Sequence[str]) -> None:
    """What a command printed in JSON, and how it ended with its last words."""
    for line in lines:
        if line.startswith("{"):
            print(line, flush=True)
    say(row | {"last": [line[:300] for line in lines[-LAST_LINES:] if not line.startswith("{")]})


def with_gpu() -> dict[str, str]:
    """Kernels are compiled, by one thread each; the repository's modules are found without being installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"TRITON_INTERPRET": "0"} | dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def say(row: dict[str, object]) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
