"""What loading to a GPU takes of the host's memory, whatever the size of the file: measured without a GPU.

    python -m benchmarks.loading

Files of two sizes are generated, Llamas of packed random layers with 16-bit embeddings, and loaded in a process of
their own to torch's meta device: mapped, verified, checked and sent through the upload buffers as to a GPU, which is
all that the host does. What CUDA itself takes of the host's memory comes on top, and some 30 MB where
scipy and accelerate are installed, which qtool does not need and transformers imports. It fails above 500 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from transformers import LlamaConfig

from benchmarks.tools import Limits, parser, print_table
from formats.encoding import Dense, encoding_of
from formats.layer import QuantizedLinear
from formats.section import pack
from formats.writer import Writer

HIDDEN, INTERMEDIATE, VOCAB, GROUP = 2048, 5632, 49152, 64
BLOCKS = 16, 96
LIMIT_BYTES = 500e6
CHILD = """
import json, sys
sys.modules.update(dict.fromkeys(("accelerate", "scipy", "sklearn")))  # as if they were not installed
import torch
from formats.build import build_model
from formats.placement import Placement, Sizes
from formats.reader import QtmFile, verify_file
from qtool.memory import peak_rss_bytes, reset_peak, rss_bytes
torch.set_num_threads(1)
reset_peak()
before = rss_bytes()
file, meta = QtmFile.open(sys.argv[1]), torch.device("meta")
sizes = Sizes.of(file)
verify_file(file)
model = build_model(file, sizes, Placement(meta, (meta,) * len(sizes.blocks)), torch.float16)
print(json.dumps({"before": before, "peak": peak_rss_bytes()}))
"""


def main() -> None:
    args = parser(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    limits, rows = Limits(), []
    for n_blocks in BLOCKS:
        path = args.work / f"loading-{n_blocks}.qtm"
        try:
            generate(path, n_blocks)
            n_bytes = path.stat().st_size
            done = subprocess.run([sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, check=True, text=True)
        finally:
            path.unlink(missing_ok=True)
        found = json.loads(done.stdout)
        limit = limits.at_most(f"peak of {n_blocks} blocks, MB", found["peak"] / 1e6, LIMIT_BYTES / 1e6)
        rows.append((f"{n_bytes / 1e9:.2f} GB", f"{found['before'] / 1e6:.0f}", f"{found['peak'] / 1e6:.0f}", limit))
    print_table(("file", "MB after imports", "peak, MB", "at most"), rows)
    limits.finish()


def generate(path: Path, n_blocks: int) -> None:
    """A 4-bit Llama; all blocks have the same layers."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=n_blocks,
        num_attention_heads=HIDDEN // 64, tie_word_embeddings=True,
    )  # fmt: skip
    shapes = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN)}
    shapes |= {"mlp.down_proj": (HIDDEN, INTERMEDIATE)}
    layers = {shape: random_layer(shape) for shape in shapes.values()}
    sections = {shape: (encoding_of(layer), pack(layer)) for shape, layer in layers.items()}
    norm = np.ones(HIDDEN, np.float16)
    with Writer(path, overwrite=True) as writer:
        writer.add_tensor("model.embed_tokens.weight", (VOCAB, HIDDEN), Dense("F16"), np.zeros((VOCAB, HIDDEN), "<f2"))
        for index in range(n_blocks):
            for name, shape in shapes.items():
                writer.add_tensor(f"model.layers.{index}.{name}.weight", shape, *sections[shape])
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add_tensor(f"model.layers.{index}.{name}.weight", (HIDDEN,), Dense("F16"), norm)
        writer.add_tensor("model.norm.weight", (HIDDEN,), Dense("F16"), norm)
        model = {"config": config.to_dict(), "blocks": "model.layers"}
        writer.finish(model=model, recipe={}, provenance={}, quality={})


def random_layer(shape: tuple[int, int]) -> QuantizedLinear:
    rng, n_groups = np.random.default_rng(0), shape[1] // GROUP
    return QuantizedLinear(
        codes=rng.integers(0, 16, shape, np.uint8),
        scales=np.full((shape[0], n_groups), 0.01, np.float16),
        zeros=np.full((shape[0], n_groups), 8, np.uint8),
        bits=4,
        group_size=GROUP,
    )


if __name__ == "__main__":
    main()
