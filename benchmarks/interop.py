"""Exported folders in the engines that they are for: transformers' logits beside ours, and the time to export.

Each engine runs in an environment of its own below the work folder, made once. GGUF is `benchmarks.interop_gguf`.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import qtool as api
from benchmarks.peers.environments import ROOT, PeerError, interpreter
from benchmarks.tools import CALIBRATION, Limits, parser, print_table, qtool
from formats.layer import QuantizedLinear
from formats.reader import QtmFile

ENGINES = {"gptq": "gptq_engine", "compressed-tensors": "compressed_tensors_engine", "awq": "gptq_engine"}
"""Format -> the environment whose engine loads it."""
MOST_SECONDS = 30
MOST_APART = {"gptq": 2e-3, "compressed-tensors": 2e-3, "awq": 0.2, "gguf": 2e-3}
"""Of logits. AWQ's engine has no kernel for the CPU that multiplies in more than fp16."""
N_TOKENS = 256


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES), help="to be loaded by")
    args = made.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path, limits, rows = args.work / "interop-gptq.qtm", Limits(), []
    if not path.exists():
        text = ["--calibration", args.calibration]
        qtool("compress", args.model, "-o", path, "--for", "gptq", *CALIBRATION, *text)
    ids = sample(path, args.data, args.work)
    ours = logits(path, ids)
    for to in (*ENGINES, "dense", "transformers"):
        folder, start = args.work / f"interop-{to}", time.perf_counter()
        report = qtool("export", path, "--to", to, "-o", folder, "--force")
        seconds = time.perf_counter() - start
        limits.at_most(f"{to}: seconds of export", seconds, MOST_SECONDS)
        limits.at_most(f"{to}: tensors that were rounded again", len(report["losses"]), 0)
        engine, apart = "not loaded", ""
        if to in args.engines:
            linears, theirs = run_engine(ENGINES[to], folder, args.work)
            engine, difference = ", ".join(linears), float(np.abs(theirs - ours).max())
            apart = f"{difference:.1e}"
            limits.at_most(f"{to}: largest difference of a logit", difference, MOST_APART[to])
        back = ""
        if to in ENGINES:
            back = same_numbers(path, folder, args.work / "interop-back.qtm")
            limits.at_most(f"{to}: layers that import gives otherwise", 0 if back == "the same" else 1, 0)
        rows.append((to, f"{seconds:.1f}", engine, apart, back))
    rows.append(gguf_row(path, ids, ours, args.work, limits))
    print_table(("format", "seconds", "linears there", "logits apart", "imported again"), rows)
    limits.finish()


def gguf_row(
    path: Path, ids: np.ndarray[Any, Any], ours: np.ndarray[Any, Any], work: Path, limits: Limits
) -> tuple[str, ...]:
    """The same file as GGUF, by transformers' own loader, which decodes it: in this environment."""
    target, start = work / "interop.gguf", time.perf_counter()
    report = qtool("export", path, "--to", "gguf", "-o", target, "--force")
    seconds = time.perf_counter() - start
    limits.at_most("gguf: seconds of export", seconds, MOST_SECONDS)
    limits.at_most("gguf: tensors that were rounded again", len(report["losses"]), 0)
    model: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=target.name, dtype=torch.float32)
    with torch.no_grad():
        difference = float(np.abs(model(torch.from_numpy(ids)).logits.numpy() - ours).max())
    limits.at_most("gguf: largest difference of a logit", difference, MOST_APART["gguf"])
    return "gguf", f"{seconds:.1f}", "transformers' own", f"{difference:.1e}", ""


def sample(path: Path, data: Path, work: Path) -> np.ndarray[Any, Any]:
    """Token ids [1, N_TOKENS], in a file that the engines read too."""
    text = data.read_text(encoding="utf-8")[: 16 * N_TOKENS]
    ids = np.array([api.load_tokenizer(path)(text).input_ids[:N_TOKENS]], np.int64)
    np.save(work / "interop-ids.npy", ids)
    return ids


def logits(path: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    model: Any = api.load(path)
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(ids)).logits.float())


def run_engine(module: str, folder: Path, work: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Classes of the linears in the engine, and its logits."""
    try:
        python = interpreter(module, work.resolve())
    except PeerError as error:
        raise SystemExit(f"{module} cannot be installed: {error}") from error
    script, out = "benchmarks.peers.transformers_engine", work / "interop-logits.npy"
    command = [python, "-m", script, folder, work / "interop-ids.npy", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(finished.stdout.splitlines()[-1])["linears"], np.load(out)


def same_numbers(path: Path, folder: Path, back: Path) -> str:
    """Whether an import has the codes, scales and zeros of the file that was exported."""
    qtool("import", folder, "-o", back, "--force")
    with QtmFile.open(path) as one, QtmFile.open(back) as other:
        for name, entry in one.tensors.items():
            if entry.encoding.name != "dense":
                a, b = one.layer(name), other.layer(name)
                assert isinstance(a, QuantizedLinear) and isinstance(b, QuantizedLinear)
                if not all(np.array_equal(x, y) for x, y in zip(_numbers(a), _numbers(b), strict=True)):
                    return f"{name} differs"
    return "the same"


def _numbers(layer: QuantizedLinear) -> tuple[object, ...]:
    """All that a layer is: the middle for the zeros of one that is symmetric."""
    scales, order = layer.scales, layer.input_order
    assert isinstance(scales, np.ndarray) and layer.outliers is None and layer.input_scales is None
    zeros = np.full_like(scales, 1 << (layer.bits - 1)) if layer.zeros is None else layer.zeros
    return layer.bits, layer.group_size, layer.codes, scales, zeros, np.arange(1) if order is None else order


if __name__ == "__main__":
    main()
