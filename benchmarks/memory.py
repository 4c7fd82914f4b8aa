"""Whether `--max-memory` is kept: a generated Llama five times as large as the limit is compressed under it.

The limit is the least that the dry run names, so that nothing is spare.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.tools import Limits, parser, print_table, qtool

TIMES_LARGER = 5
HIDDEN, INTERMEDIATE, VOCAB, HEADS = 1024, 2816, 49152, 16


def main() -> None:
    args = parser(__doc__).parse_args()
    folder = args.work / "large"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--calibration", args.calibration, "--samples", 4, "--seq-len", 512, "--no-scale-search"]
    output = folder.with_suffix(".qtm")
    try:
        generate(folder, args.model, 1)  # one block or a hundred: the least is the same
        limit = qtool("compress", folder, "-o", output, *options, "--dry-run")["peak_rss_bytes"]
        n_bytes = generate(folder, args.model, 1 + TIMES_LARGER * limit // block_bytes())
        made = qtool("compress", folder, "-o", output, *options, "--max-memory", limit, "--force")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        output.unlink(missing_ok=True)
    limits, share = Limits(), made["peak_rss_bytes"] / limit
    rows = [
        ("limit", f"{limit / 1e9:.3f} GB", "", ""),
        ("model on disk", f"{n_bytes / 1e9:.3f} GB", f"{n_bytes / limit:.2f}", ""),
        ("peak memory", f"{made['peak_rss_bytes'] / 1e9:.3f} GB", f"{share:.2f}", limits.at_most("peak", share, 1)),
        ("time", f"{made['seconds']:.0f} s", "", ""),
    ]
    print_table(("what", "measured", "of the limit", "at most"), rows)
    limits.finish()


def block_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of one block."""
    name = f"model.layers.{index}"
    attention = {f"{name}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    mlp = {f"{name}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
    norms = {f"{name}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return attention | mlp | {f"{name}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)} | norms


def block_bytes() -> int:
    return sum(4 * torch.Size(shape).numel() for shape in block_shapes(0).values())


def generate(folder: Path, tokenizer_of: Path, n_blocks: int) -> int:
    """Write a float32 Llama of random weights, one shard a block; returns the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=n_blocks,
        num_attention_heads=HEADS, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    torch.manual_seed(0)
    outside: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shard_of, n_bytes = {}, 0
    for index, shapes in enumerate([outside, *map(block_shapes, range(n_blocks))]):
        tensors = {
            name: torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape) for name, shape in shapes.items()
        }
        shard = f"model-{index:05}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(tensors, shard)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return n_bytes


if __name__ == "__main__":
    main()
