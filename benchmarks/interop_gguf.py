"""Exported GGUF files in the engine that they are for: llama.cpp's own perplexity beside ours, and the time to export.

llama-cpp-python is built from its source in an environment below the work folder, once: up to a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, PeerError, interpreter
from benchmarks.tools import CALIBRATION, Limits, parser, print_table, qtool
from calibration.corpus import read_text
from formats.export.gguf import export_gguf
from formats.reader import QtmFile
from qtool.importance import measure_importance

LOSSY = ("q8_0", "q4_1", "q5_1", "q6_k", "q5_k", "q4_k")
"""What the first file is fitted to anew; all are exported as they are too."""
FOR = ("q4_0", "q4_1", "q4_k", "q6_k")
MOST_SECONDS, MOST_APART = 30, 0.005
SEQ_LEN = 512


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--windows", type=int, default=16, help="of 512 tokens, that perplexity is measured on")
    args = made.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    limits, rows = Limits(), []
    text = args.work / "interop.txt"  # the very text: ours has documents joined by blank lines
    text.write_text(read_text(str(args.data), split="test").joined(), encoding="utf-8", newline="")
    protocol = ["--protocol", "llama.cpp", "--seq-len", SEQ_LEN, "--max-windows", args.windows, "--data", args.data]
    for made_for in FOR:
        path = args.work / f"interop-{made_for}.qtm"
        if not path.exists():
            options = ["--for", f"gguf:{made_for}", *CALIBRATION, "--calibration", args.calibration]
            qtool("compress", args.model, "-o", path, *options)
        ours = qtool("eval", "perplexity", path, *protocol)
        for kind in (None, *(LOSSY if made_for == FOR[0] else ())):
            seconds, n_losses, target = export(path, kind, args.work)
            theirs = llama_cpp(target, text, args.windows, args.work)
            name = f"for {made_for}" + (f", as {kind}" if kind else "")
            if theirs["tokens_sha256"] != ours["tokens_sha256"]:
                limits.at_most(f"{name}: tokens that differ from ours", 1, 0)
            apart = abs(theirs["perplexity"] / ours["perplexity"] - 1)
            rows.append((name, n_losses, f"{target.stat().st_size / 1e6:.1f}", f"{seconds:.1f}",
                         f"{theirs['perplexity']:.4f}", f"{ours['perplexity']:.4f}", f"{apart:.2%}"))  # fmt: skip
            limits.at_most(f"{name}: seconds of export", seconds, MOST_SECONDS)
            if kind is None:
                limits.at_most(f"{name}: tensors fitted anew", n_losses, 0)
                limits.at_most(f"{name}: share by which llama.cpp's perplexity is apart", apart, MOST_APART)
    print_table(("type", "tensors fitted anew", "MB", "seconds", "llama.cpp", "ours", "apart"), rows)
    limits.finish()


def export(path: Path, kind: str | None, work: Path) -> tuple[float, int, Path]:
    """Seconds, tensors whose values changed, and the file; what inputs matter is measured where that counts."""
    target, start = work / f"interop-{kind or 'exact'}.gguf", time.perf_counter()
    importance = measure_importance(path) if kind is not None and kind.endswith("_k") else None
    with QtmFile.open(path) as file:
        report = export_gguf(
            file, target, gguf_type=kind, lossy=kind is not None, overwrite=True, importance=importance
        )
    return time.perf_counter() - start, len(report.losses), target


def llama_cpp(model: Path, text: Path, windows: int, work: Path) -> dict[str, Any]:
    """What `llama_cpp_engine` prints."""
    try:
        python = interpreter("llama_cpp_engine", work.resolve())
    except PeerError as error:
        raise SystemExit(f"llama-cpp-python cannot be built: {error}") from error
    command = [python, "-m", "benchmarks.peers.llama_cpp_engine", model, text, str(SEQ_LEN), str(windows)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    # As a module: beside it lies one with the name of the package that it imports.
    finished = subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)
    return dict(json.loads(finished.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
