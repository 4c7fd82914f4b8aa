"""Time and memory against parameters: a generated mixture of experts of more than 20 GB on disk.

    python -m benchmarks.scale [--blocks 17] [--at 1 2 4 8]

Weights are synthetic, written shard by shard in bfloat16: Qwen3-MoE's layout, 128 experts of 2048 x 768 a block, 1.2 GB
each. One run over all of it is watched: when so many blocks are finished, its time and the largest memory that it has
held are read. After the last of these counts it is killed; the same command is given again, has to go on behind the
last finished block, and is watched for one block more. A model of one block is compressed to its end besides, which
says what a run costs before its first block and after its last. What is printed is all of that, the straight line
through the times, and what it says of Switch-c2048 (1.6 trillion parameters).
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Stamp:
    """A run when so many blocks were finished."""

    blocks: int
    seconds: float
    peak_rss_bytes: int

    @property
    def parameters(self) -> int:
        """That are done with."""
        return _n_parameters(_outside_shapes()) + self.blocks * _n_parameters(_block_shapes(0))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=17, help="of the large model")
    options.add_argument(
        "--at", type=int, nargs="+", default=[1, 2, 4, 8], help="finished blocks to read time and memory at"
    )
    options.set_defaults(work=Path("build/scale"))
    args = options.parse_args()
    if max(args.at) + 2 > args.blocks:
        options.error(f"--at {max(args.at)}: must leave two of --blocks {args.blocks}, one to go on with and one more")
    work = args.work / "scale-models"  # a folder of its own, since it is removed
    shutil.rmtree(work, ignore_errors=True)
    try:
        n_bytes = generate(work / "large", args.model, args.blocks)
        generate(work / "small", args.model, 1)
        print(f"{args.blocks} blocks, {n_bytes / 1e9:.1f} GB on disk", flush=True)
        small = compress_whole(work / "small", args.calibration)
        stamps, resumed = watch(work / "large", args.calibration, sorted(args.at))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    limits = Limits()
    rows = [_row(f"{stamp.blocks} of {args.blocks}", stamp, limits) for stamp in stamps]
    rows.append(_row(f"killed and given again: 1 more, {resumed.blocks} done", resumed, limits))
    rows.append(_row("a model of 1 block, from start to end", small, limits))
    print_table(("blocks", "parameters", "seconds", "peak memory"), rows)
    print_laws([stamp for stamp in stamps if stamp.blocks])
    limits.finish()


def _row(what: str, stamp: Stamp, limits: Limits) -> tuple[str, ...]:
    limits.at_most(f"{what}: peak memory", stamp.peak_rss_bytes, MAX_RSS)
    peak = f"{stamp.peak_rss_bytes / 1e9:.2f} GB"
    return what, f"{stamp.parameters / 1e9:.2f} G", f"{stamp.seconds:.0f}", peak


def _n_parameters(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def generate(folder: Path, tokenizer_of: Path, n_blocks: int) -> int:
    """A model of so many blocks, one shard each, of which one is in memory at a time.  -> bytes of its weights"""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for index, shapes in enumerate([_outside_shapes(), *map(_block_shapes, range(n_blocks))]):
        shard = f"model-{index:05}.safetensors"
        seed = index * len(shapes)
        save_file({name: _values(shape, seed + i) for i, (name, shape) in enumerate(shapes.items())}, folder / shard)
        weight_map |= dict.fromkeys(shapes, shard)
        n_bytes += (folder / shard).stat().st_size
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
    return n_bytes


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


def _values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """bfloat16, normal; a norm's are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).bfloat16()


def command(folder: Path, calibration: Path) -> list[object]:
    output = folder.with_suffix(".qtm")
    return ["compress", folder, "-o", output, "--calibration", calibration, *OPTIONS, "--log-file", _log(folder)]


def _log(folder: Path) -> Path:
    return folder.with_suffix(".jsonl")


def compress_whole(folder: Path, calibration: Path) -> Stamp:
    made = qtool(*command(folder, calibration))
    print(f"1 block from start to end: a file of {made['file_bytes'] / 1e9:.2f} GB", flush=True)
    return Stamp(1, made["seconds"], made["peak_rss_bytes"])


def watch(folder: Path, calibration: Path, at: list[int]) -> tuple[list[Stamp], Stamp]:
    """The run before its first block and when so many were finished; killed and given again, when one more was."""
    stamps = []
    with running(folder, calibration) as finished:
        while not stamps or stamps[-1].blocks < at[-1]:
            stamp = next(finished)
            if stamp.blocks in (0, *at):
                stamps.append(stamp)
    n_lines = len(_layers(folder))
    with running(folder, calibration) as finished:
        resumed = next(finished)
    again = {int(layer.split(".")[2]) for layer in _layers(folder)[n_lines:]}
    if min(again) < at[-1]:
        sys.exit(f"given again, the run began with block {min(again)}, not behind the last finished one")
    return stamps, resumed


def _layers(folder: Path) -> list[str]:
    """Those that were solved, in their order."""
    return [json.loads(line)["layer"] for line in _log(folder).read_text().splitlines()]


@contextmanager
def running(folder: Path, calibration: Path) -> Iterator[Iterator[Stamp]]:
    """The run, and a stamp for each step that it ends; it is killed in the end."""
    run = subprocess.Popen([sys.executable, "-m", "qtool.cli", *map(str, command(folder, calibration))])
    try:
        yield _stamps(run, folder.with_suffix(".qtm.work") / "journal.jsonl")
    finally:
        run.kill()
        run.wait()


def _stamps(run: subprocess.Popen[bytes], journal: Path) -> Iterator[Stamp]:
    started, seen = time.perf_counter(), _n_lines(journal)
    while run.poll() is None:
        if (n_lines := _n_lines(journal)) > seen:
            status = Path(f"/proc/{run.pid}/status").read_text()
            stamp = Stamp(n_lines - 1, time.perf_counter() - started, 1024 * int(status.split("VmHWM:")[1].split()[0]))
            print(stamp, file=sys.stderr, flush=True)
            seen = n_lines
            yield stamp
        time.sleep(POLL_SECONDS)
    sys.exit("the run ended before it was to be killed")


def _n_lines(path: Path) -> int:
    """Of a journal, one for what lies outside the blocks and one for each block."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def print_laws(stamps: list[Stamp]) -> None:
    """The line through the times, the spread of the memory, and what they say of a model of 1.6 trillion parameters."""
    parameters, seconds, memory = np.array([(s.parameters, s.seconds, s.peak_rss_bytes) for s in stamps], float).T
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
