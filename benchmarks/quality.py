"""Perplexity against bits per weight: qtool's methods and llama.cpp's types, all in one evaluation.

llama.cpp's types are rounded by its own `gguf` package (bit for bit what llama-quantize writes without an
importance matrix), applied to the linears of the blocks, and measured as an ordinary model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize
from safetensors.torch import load_file

from benchmarks.folder import replace_tensors
from benchmarks.peers.job import is_block_linear
from benchmarks.tools import CALIBRATION, MEASURE, Limits, parser, print_table, qtool

LEFT = ["--embeddings", 16]
RECIPES = [
    ("GPTQ 4 bits, group 64, embeddings 8 bits", ["--bits", 4, "--group-size", 64]),
    ("GPTQ 4 bits, group 64", ["--bits", 4, "--group-size", 64, *LEFT]),
    ("GPTQ 4 bits, group 64, blocks independent", ["--bits", 4, "--group-size", 64, "--independent", *LEFT]),
    ("round to nearest 4 bits, group 64", ["--bits", 4, "--group-size", 64, "--method", "rtn", *LEFT]),
    ("GPTQ, llama.cpp's Q4_1", ["--format", "q_1", "--bits", 4, *LEFT]),
    ("GPTQ, llama.cpp's Q4_0", ["--for", "gguf:q4_0", *LEFT]),
    ("GPTQ, llama.cpp's K types, 5.5 bits", ["--for", "gguf:q4_k", "--target-bits", 5.5, *LEFT]),
    ("GPTQ 3 bits, group 64", ["--bits", 3, "--group-size", 64, *LEFT]),
    ("round to nearest 3 bits, group 64", ["--bits", 3, "--group-size", 64, "--method", "rtn", *LEFT]),
]
KV_BITS = 8, 4
PEERS = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1]


def main() -> None:
    args = parser(__doc__).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = qtool("eval", "perplexity", args.model, "--data", args.data, *MEASURE)["perplexity"]
    rows = [("uncompressed", "16", f"{base:.3f}", "1.000")]
    for name, options in RECIPES:
        output = args.work / "quality.qtm"
        made = qtool("compress", args.model, "-o", output, "--force", *options, *CALIBRATION,
                     "--calibration", args.calibration)  # fmt: skip
        rows.append(_row(f"qtool, {name}", made["bits_per_weight"], output, args.data, base))
    for kind in PEERS:
        folder = args.work / "peer"
        bits = round_like_llama_cpp(args.model, folder, kind)
        rows.append(_row(f"llama.cpp {kind.name}", bits, folder, args.data, base))
    for bits in KV_BITS:
        name = f"uncompressed, keys and values in {bits} bits"
        rows.append(_row(name, 16, args.model, args.data, base, "--kv-bits", bits))
    print_table(("method", "bits per weight", "perplexity", "ratio"), rows)
    limits = Limits()
    limits.at_most("bits per weight", float(rows[1][1]), 4.35)
    limits.at_most("perplexity ratio at 4 bits, group 64", float(rows[1][3]), 1.23)
    limits.at_most("perplexity ratio, keys and values in 8 bits", float(rows[-2][3]), 1.01)
    limits.at_most("perplexity ratio, keys and values in 4 bits", float(rows[-1][3]), 1.1)
    ratios = {name: float(ratio) for name, _, _, ratio in rows}
    rounded = ratios["qtool, round to nearest 3 bits, group 64"]
    limits.at_most("3 bits against round to nearest", ratios["qtool, GPTQ 3 bits, group 64"] / rounded, 0.5)
    for kind in PEERS:
        lost, theirs = ratios[f"qtool, GPTQ, llama.cpp's {kind.name}"] - 1, ratios[f"llama.cpp {kind.name}"] - 1
        limits.at_most(f"what {kind.name} loses, beside llama.cpp's own", lost / theirs, 0.75)
    limits.finish()


def _row(name: str, bits: float, model: Path, data: Path, base: float, *options: object) -> tuple[str, str, str, str]:
    perplexity = qtool("eval", "perplexity", model, "--data", data, *MEASURE, *options)["perplexity"]
    return name, f"{bits:g}" if bits == 16 else f"{bits:.3f}", f"{perplexity:.3f}", f"{perplexity / base:.3f}"


def round_like_llama_cpp(model: Path, folder: Path, kind: GGMLQuantizationType) -> float:
    """Copy `model` to `folder` with the blocks' linears rounded to `kind`; the bits per weight that it takes."""
    rounded = {
        name: dequantize(quantize(tensor.float().numpy(), kind), kind)
        for name, tensor in load_file(model / "model.safetensors").items()
        if is_block_linear(name, tensor.dim())
    }
    replace_tensors(model, folder, {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in rounded.items()})
    weights, block_bytes = GGML_QUANT_SIZES[kind]
    return 8 * block_bytes / weights


if __name__ == "__main__":
    main()
