"""Exported GGUF files in the engine that they are for: llama.cpp's own perplexity beside ours, and the time to export.

llama.cpp rounds activations to 8 bits before it multiplies them with a quantized weight, which costs this model some
0.7 %. So ours is measured twice, plainly and with activations that are rounded as there; and one file is handed over as
its decoded values in float32 too, with which llama.cpp rounds nothing.

llama-cpp-python is built from its source in an environment below the work folder, once: up to a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import qtool as api
from benchmarks.peers.environments import ROOT, PeerError, interpreter
from benchmarks.tools import CALIBRATION, Limits, parser, print_table, qtool
from calibration.corpus import read_text
from formats.export.gguf import export_gguf
from formats.ggml.types import BLOCK, SUPER_BLOCK
from formats.reader import QtmFile
from qtool.importance import measure_importance

LOSSY = ("q8_0", "q4_1", "q5_1", "q6_k", "q5_k", "q4_k")
"""What the first file is fitted to anew; all are exported as they are too."""
DECODED = "f32"
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
    measure = Measure(args.data, text, args.windows, args.work)
    for made_for in FOR:
        path = args.work / f"interop-{made_for}.qtm"
        if not path.exists():
            options = ["--for", f"gguf:{made_for}", *CALIBRATION, "--calibration", args.calibration]
            qtool("compress", args.model, "-o", path, *options)
        plain, rounded = measure.ours(path), measure.ours(path, rounded=True)
        kinds = (None, DECODED, *LOSSY) if made_for == FOR[0] else (None,)
        for kind in kinds:
            seconds, n_losses, target = export(path, kind, args.work)
            theirs = measure.llama_cpp(target)
            name = f"for {made_for}" + (f", as {kind}" if kind else "")
            ours = plain if kind == DECODED else rounded
            apart = abs(theirs / ours - 1)
            rows.append((name, n_losses, f"{target.stat().st_size / 1e6:.1f}", f"{seconds:.1f}",
                         f"{theirs:.4f}", f"{plain:.4f}", f"{rounded:.4f}", f"{apart:.3%}"))  # fmt: skip
            limits.at_most(f"{name}: seconds of export", seconds, MOST_SECONDS)
            if kind in (None, DECODED):
                limits.at_most(f"{name}: tensors fitted anew", n_losses, 0)
                limits.at_most(f"{name}: share by which llama.cpp's perplexity is apart", apart, MOST_APART)
    columns = ("type", "tensors fitted anew", "MB", "seconds", "llama.cpp", "ours", "ours, inputs in 8 bits", "apart")
    print_table(columns, rows)
    limits.finish()


class Measure:
    """Perplexity on the same tokens, by llama.cpp's protocol."""

    def __init__(self, data: Path, text: Path, windows: int, work: Path) -> None:
        self.data, self.text, self.windows, self.work = data, text, windows, work
        self._tokens = ""

    def ours(self, path: Path, *, rounded: bool = False) -> float:
        """rounded: activations as llama.cpp rounds them."""
        with inputs_in_8_bits(path) if rounded else nullcontext():
            found = api.evaluate(
                path, protocol="llama.cpp", seq_len=SEQ_LEN, max_windows=self.windows, data=str(self.data)
            ).to_dict()
        self._tokens = found["tokens_sha256"]
        return float(found["perplexity"])

    def llama_cpp(self, model: Path) -> float:
        """What `llama_cpp_engine` prints."""
        try:
            python = interpreter("llama_cpp_engine", self.work.resolve())
        except PeerError as error:
            raise SystemExit(f"llama-cpp-python cannot be built: {error}") from error
        command = [python, "-m", "benchmarks.peers.llama_cpp_engine", model, self.text, str(SEQ_LEN), str(self.windows)]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        # As a module: beside it lies one with the name of the package that it imports.
        finished = subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options)
        found = json.loads(finished.stdout.splitlines()[-1])
        if found["tokens_sha256"] != self._tokens:
            raise SystemExit(f"{model}: llama.cpp sees other tokens than we do")
        return float(found["perplexity"])


@contextmanager
def inputs_in_8_bits(path: Path) -> Iterator[None]:
    """Every linear's input is rounded in blocks, of 256 for a weight of a K type and of 32 for others."""
    with QtmFile.open(path) as file:
        has_k = any(getattr(entry.encoding, "stat_bits", 0) for entry in file.tensors.values())
    linear = functional.linear

    def rounding(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        size = SUPER_BLOCK if has_k and weight.shape[1] % SUPER_BLOCK == 0 else BLOCK
        blocks = x.float().unflatten(-1, (-1, size))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(blocks / step.where(step > 0, 1.0))
        return linear((codes * (step if size == SUPER_BLOCK else step.half().float())).flatten(-2), weight, bias)

    functional.linear = rounding
    try:
        yield
    finally:
        functional.linear = linear


def export(path: Path, kind: str | None, work: Path) -> tuple[float, int, Path]:
    """Seconds, tensors whose values changed, and the file; what inputs matter is measured where that counts."""
    if kind == DECODED:
        return export(decoded(path, work), None, work)
    target, start = work / f"interop-{kind or 'exact'}.gguf", time.perf_counter()
    importance = measure_importance(path) if kind is not None and kind.endswith("_k") else None
    with QtmFile.open(path) as file:
        report = export_gguf(
            file, target, gguf_type=kind, lossy=kind is not None, overwrite=True, importance=importance
        )
    return time.perf_counter() - start, len(report.losses), target


def decoded(path: Path, work: Path) -> Path:
    """A file of the decoded values in float32."""
    folder, plain = work / "interop-plain", work / "interop-plain.qtm"
    qtool("export", path, "--to", "dense", "-o", folder, "--force")
    qtool("compress", folder, "-o", plain, "--method", "rtn", "--ignore", ".", "--embeddings", 16, "--force")
    return plain


if __name__ == "__main__":
    main()
