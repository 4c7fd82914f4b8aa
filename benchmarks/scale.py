"""Time and memory against parameters: generated mixtures of experts, up to one of more than 20 GB on disk.

    python -m benchmarks.scale [--blocks 1 2 4 8] [--whole 18] [--interrupt]

Weights are synthetic, written shard by shard in bfloat16: Qwen3-MoE's layout, 128 experts of 2048 x 768 a block, 1.2 GB
each. Models of several blocks share their shards. With `--interrupt` the largest run is killed in the middle and given
again. What is printed is each run's time and peak memory, the straight line through the times, and what it says of
Switch-c2048 (1.6 trillion parameters).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3MoeConfig

from benchmarks.tools import Limits, parser, print_table, qtool

HIDDEN, EXPERT, N_EXPERTS, HEADS, VOCAB = 2048, 768, 128, 16, 49152
MAX_RSS = 3e9
SWITCH_PARAMETERS = 1.6e12
A100_FLOPS, DISK_BYTES = 19.5e12, 2e9
"""Datasheet: float32 without tensor cores; and bytes a second of a fast disk."""
OPTIONS = ["--method", "ternary", "--samples", 16, "--seq-len", 512, "--embeddings", 8]
SHAPES = {"gate": (EXPERT, HIDDEN), "up": (EXPERT, HIDDEN), "down": (HIDDEN, EXPERT)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--whole", type=int, default=17, help="blocks of the largest model; 0 leaves it out")
    options.add_argument("--interrupt", action="store_true", help="kill the largest run once and give it again")
    options.set_defaults(work=Path("build/scale"))
    args = options.parse_args()
    limits, rows = Limits(), []
    counts = sorted({*args.blocks, args.whole} - {0})
    for n_blocks in counts:
        folder = args.work / f"{n_blocks}-blocks"
        n_bytes = generate(args.work / "shards", folder, args.model, n_blocks)
        is_last = args.interrupt and n_blocks == counts[-1]
        made = compress(folder, args.calibration, killed_after=n_blocks // 2 if is_last else None)
        parameters = made["inspected"]["parameters"]
        limits.at_most(f"{n_blocks} blocks: peak memory", made["peak_rss_bytes"], MAX_RSS)
        rows.append((n_blocks, parameters, n_bytes, made["seconds"], made["peak_rss_bytes"], made["file_bytes"]))
    print_table(
        ("blocks", "parameters", "on disk", "seconds", "seconds a block", "peak memory", "file"),
        [
            (n, f"{p / 1e9:.2f} G", f"{b / 1e9:.1f} GB", f"{s:.0f}", f"{s / n:.0f}", _gb(m), _gb(f))
            for n, p, b, s, m, f in rows
        ],
    )
    print_laws(rows)
    limits.finish()


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def generate(shards: Path, folder: Path, tokenizer_of: Path, n_blocks: int) -> int:
    """A model of so many blocks whose files are links to shards, which are made where they are missing.  -> bytes"""
    shards.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    names = ["outside", *(f"block-{i}" for i in range(n_blocks))]
    weight_map: dict[str, str] = {}
    total = 0
    for index, name in enumerate(names):
        path = shards / f"{name}.safetensors"
        if not path.exists():
            save_file(_outside() if name == "outside" else _block(index - 1), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        shard = folder / path.name
        shard.unlink(missing_ok=True)
        os.link(path, shard)
        total += path.stat().st_size
        keys = _outside_shapes() if name == "outside" else _block_shapes(index - 1)
        weight_map |= dict.fromkeys(keys, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=EXPERT,
        moe_intermediate_size=EXPERT,
        num_hidden_layers=n_blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        head_dim=HIDDEN // HEADS,
        num_experts=N_EXPERTS,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return total


def _outside_shapes() -> dict[str, tuple[int, ...]]:
    return {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}


def _block_shapes(index: int) -> dict[str, tuple[int, ...]]:
    name, head = f"model.layers.{index}", HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{name}.self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{name}.self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{name}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{name}.self_attn.q_norm.weight": (head,),
        f"{name}.self_attn.k_norm.weight": (head,),
        f"{name}.input_layernorm.weight": (HIDDEN,),
        f"{name}.post_attention_layernorm.weight": (HIDDEN,),
        f"{name}.mlp.gate.weight": (N_EXPERTS, HIDDEN),
    }
    for expert in range(N_EXPERTS):
        shapes |= {f"{name}.mlp.experts.{expert}.{part}_proj.weight": shape for part, shape in SHAPES.items()}
    return shapes


def _outside() -> dict[str, torch.Tensor]:
    return {name: _values(shape, seed=0) for name, shape in _outside_shapes().items()}


def _block(index: int) -> dict[str, torch.Tensor]:
    """Its tensors; 1.2 GB in memory while they are written."""
    shapes = _block_shapes(index)
    return {name: _values(shape, seed=1 + index * len(shapes) + i) for i, (name, shape) in enumerate(shapes.items())}


def _values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bfloat16, normal; a norm's are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).bfloat16()


def compress(folder: Path, calibration: Path, killed_after: int | None) -> dict[str, Any]:
    """What `qtool compress` says of its run; `killed_after` so many blocks it is killed and given once more."""
    output = folder.with_suffix(".qtm")
    arguments = ["compress", folder, "-o", output, "--calibration", calibration, *OPTIONS, "--force"]
    before = 0.0
    if killed_after is not None:
        started = time.perf_counter()
        _kill_after(arguments, output, killed_after)
        before = time.perf_counter() - started
        print(f"killed after {killed_after} blocks and {before:.0f} s; given again", file=sys.stderr)
    made = qtool(*arguments)
    made["inspected"] = qtool("inspect", output)
    made["seconds"] += before
    output.unlink()
    return made


def _kill_after(arguments: list[object], output: Path, n_blocks: int) -> None:
    command = [sys.executable, "-m", "qtool.cli", *map(str, arguments)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    journal = output.with_name(f"{output.name}.work") / "journal.jsonl"
    while run.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) > n_blocks:
            run.send_signal(signal.SIGKILL)
            run.wait()
            return
        time.sleep(1)
    sys.exit("the run ended before it could be killed")


def print_laws(rows: list[tuple[Any, ...]]) -> None:
    """The line through the times, the spread of the memory, and what they say of a model of 1.6 trillion parameters."""
    if len(rows) < 2:
        return
    parameters, seconds, memory = (np.array([row[i] for row in rows], float) for i in (1, 3, 4))
    slope, constant = np.polyfit(parameters, seconds, 1)
    left = np.abs(seconds - slope * parameters - constant).max() / seconds.max()
    print(f"\ntime: {constant:.0f} s + {1e9 * slope:.1f} s for each billion parameters, to within {left:.1%}")
    print(f"memory: {memory.min() / 1e9:.2f} to {memory.max() / 1e9:.2f} GB, {memory.max() / memory.min():.2f} times")
    here, own = slope * SWITCH_PARAMETERS, _flops()
    reading = 2 * SWITCH_PARAMETERS / DISK_BYTES
    there = max(here * own / A100_FLOPS, reading)
    print(f"""
Switch-c2048, {SWITCH_PARAMETERS:.1e} parameters, extrapolated, not measured:
  this machine: {here / 86400:.1f} days, if a weight of its experts (2080 x 6144) costs what a weight costs here
  one A100:     {there / 3600:.1f} hours, if it does as well by its {A100_FLOPS / 1e12:g} TFLOPS as this machine by the
                {own / 1e12:.3f} that a product of matrices reaches here, and no better than reading 16-bit weights at
                {DISK_BYTES / 1e9:g} GB/s, which takes {reading / 3600:.1f} hours
                (QMoE's own figure: 16 hours on an A6000)""")


def _flops() -> float:
    """Operations a second of a float32 matrix product on this machine, the best of five."""
    x, seconds = torch.randn(2048, 2048), []
    for _ in range(5):
        started = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


if __name__ == "__main__":
    main()
