"""Small times: decoding a layer against copying its result, opening a file, `qtool --help`, determinism."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.tools import parser, print_table, qtool
from formats.encoding import Uniform
from formats.kernels.cpu import decode_uniform, unpack_zeros
from formats.loader import section_parts
from formats.reader import QtmFile

REPEATS = 30


def main() -> None:
    args = parser(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    files = [args.work / f"speed-{i}.qtm" for i in (1, 2)]
    options = ["--bits", 4, "--group-size", 64, "--samples", 4, "--seq-len", 512, "--force"]
    for path in files:
        qtool("compress", args.model, "-o", path, "--calibration", args.calibration, *options)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    rows = [("the same command twice", "byte-identical" if len(digests) == 1 else "DIFFERENT FILES", "")]
    rows += decode_rows(files[0])
    python = seconds_of("-c", "pass")
    for name, arguments in {
        "qtool inspect, beyond Python's start": ("-m", "qtool.cli", "inspect", str(files[0])),
        "open and list, beyond Python's start": ("-c", f"import qtool.report as r; r.inspect_file({str(files[0])!r})"),
        "qtool --help, from start to end": ("-m", "qtool.cli", "--help"),
    }.items():
        whole = seconds_of(*arguments)
        rows.append((name, f"{whole - python * ('beyond' in name):.3f} s", ""))
    print_table(("what", "measured", "ratio"), rows)


def decode_rows(path: Path) -> list[tuple[str, str, str]]:
    """Median times of decoding a layer of each shape and of copying its float32 result."""
    rows, seen = [], set()
    with QtmFile.open(path) as file:
        for entry in file.tensors.values():
            if not isinstance(entry.encoding, Uniform) or entry.shape in seen or "layers" not in entry.name:
                continue
            seen.add(entry.shape)
            parts, n, encoding = section_parts(file, entry), entry.shape[1], entry.encoding
            weight = decode_uniform(parts, unpack_zeros(parts, encoding), n, encoding)
            target = torch.empty_like(weight)
            decode, copy = paired_medians(
                lambda p=parts, n=n, e=encoding: decode_uniform(p, unpack_zeros(p, e), n, e),
                lambda t=target, w=weight: t.copy_(w),
            )
            shape = "x".join(map(str, entry.shape))
            rows.append(
                (f"decode {shape} / copy it", f"{decode * 1e3:.2f} / {copy * 1e3:.2f} ms", f"{decode / copy:.1f} times")
            )
    return rows


def paired_medians(a: Callable[[], object], b: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of two functions timed in turn, so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for function, row in zip((a, b), times, strict=True):
            start = time.perf_counter()
            function()
            row.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def seconds_of(*arguments: str) -> float:
    """Median seconds of a Python process."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
