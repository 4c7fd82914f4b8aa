"""Times: decoding a layer against copying its result, opening and verifying a file, `qtool --help`, determinism."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.tools import Limits, parser, print_table, qtool
from formats.encoding import MatrixEncoding, Shape, encoding_of
from formats.kernels.cpu_linear import hold
from formats.layer import QuantizedLinear
from formats.reader import QtmFile, verify
from formats.section import pack
from formats.tensors import section_tensor
from formats.writer import Writer

REPEATS = 30
SMALL = 1 << 18  # below this a layer's decoding is the overhead of twenty torch calls, a copy's that of one
OPEN_AND_LIST = "import sys; from qtool.report import inspect_file; inspect_file(sys.argv[1])"


def main() -> None:
    args = parser(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    files = [args.work / f"speed-{i}.qtm" for i in (1, 2)]
    options = ["--bits", 4, "--group-size", 64, "--samples", 4, "--seq-len", 512, "--force"]
    for path in files:
        qtool("compress", args.model, "-o", path, "--calibration", args.calibration, *options)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    limits = Limits()
    limits.at_most("different files of the same command", len(digests), 1)
    rows = [("the same command twice", "byte-identical" if len(digests) == 1 else "DIFFERENT FILES", "", "")]
    rows += decode_rows(files[0], limits)
    rows.append(verify_row(args.work / "speed-large.qtm", limits))
    python = seconds_of("-c", "pass")
    for name, arguments, limit in (
        ("qtool inspect, beyond Python's start", ("-m", "qtool.cli", "inspect", str(files[0])), None),
        ("open and list, beyond Python's start", ("-c", OPEN_AND_LIST, str(files[0])), 0.2),
        ("qtool --help, from start to end", ("-m", "qtool.cli", "--help"), 0.5),
    ):
        seconds = seconds_of(*arguments) - python * ("beyond" in name)
        promise = "" if limit is None else f"{limits.at_most(name, seconds, limit)} s"
        rows.append((name, f"{seconds:.3f} s", "", promise))
    print_table(("what", "measured", "ratio", "limit"), rows)
    limits.finish()


def decode_rows(path: Path, limits: Limits) -> list[tuple[str, str, str, str]]:
    """Median times of decoding a layer of each shape and of copying its float32 result."""
    rows, seen = [], set()
    with QtmFile.open(path) as file:
        for entry in file.tensors.values():
            if not isinstance(entry.encoding, MatrixEncoding) or entry.shape in seen or "layers" not in entry.name:
                continue
            seen.add(entry.shape)
            where = section_tensor(file, entry), entry.encoding, entry.shape
            weight = _decoded(*where)
            target = torch.empty_like(weight)
            decode, copy = paired_medians(lambda w=where: _decoded(*w), lambda t=target, w=weight: t.copy_(w))
            name, ratio = f"decode {'x'.join(map(str, entry.shape))} / copy it", decode / copy
            limit = limits.at_most(name, ratio, 6) if weight.numel() >= SMALL else ""
            rows.append((name, f"{decode * 1e3:.2f} / {copy * 1e3:.2f} ms", f"{ratio:.1f}", limit))
    return rows


def _decoded(section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """What a call of a layer decodes, in one go."""
    return encoding.rows(hold(section, encoding, shape), slice(None), shape)


def verify_row(path: Path, limits: Limits) -> tuple[str, str, str, str]:
    """Median seconds to verify a gigabyte that the page cache holds."""
    layer = QuantizedLinear(
        codes=np.zeros((4096, 4096), np.uint8),
        scales=np.ones((4096, 64), np.float16),
        zeros=np.zeros((4096, 64), np.uint8),
        bits=4,
        group_size=64,
    )
    encoding, section = encoding_of(layer), pack(layer)
    with Writer(path, overwrite=True) as writer:
        for i in range(10**9 // len(section)):
            writer.add_tensor(f"{i}", layer.codes.shape, encoding, section)
        writer.finish(model={}, recipe={}, provenance={}, quality={})
    times = []
    for _ in range(5):
        start = time.perf_counter()
        n_bytes = verify(path).n_bytes
        times.append((time.perf_counter() - start) / (n_bytes / 1e9))
    path.unlink()
    name, seconds = "verify, a gigabyte", statistics.median(times)
    return name, f"{seconds:.2f} s", f"{1 / seconds:.2f} GB/s", f"{limits.at_most(name, seconds, 1.0)} s"


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
