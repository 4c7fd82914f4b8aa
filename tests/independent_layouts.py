"""The layouts of other engines read a second time, bit by bit and with nothing of ours: what exports must decode to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """`quantization_config` and all tensors, of one file or of shards."""
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    return json.loads((folder / "config.json").read_text())["quantization_config"], tensors


def streams(words: torch.Tensor, bits: int, n: int) -> np.ndarray:
    """[rows, words] int32 -> [rows, n] codes; each row is one stream of bits, the lowest first."""
    octets = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : n * bits]
    return (stream.reshape(len(stream), n, bits).astype(np.int64) << np.arange(bits)).sum(-1)


def decode_gptq(config: dict, module: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """[out, in] f32"""
    bits, _, _ = gptq_settings(config, module)
    part = {name: tensors[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
    in_features, out_features = part["qweight"].shape[0] * 32 // bits, part["qweight"].shape[1]
    codes = streams(part["qweight"].T, bits, in_features)
    zeros = streams(part["qzeros"], bits, out_features).T
    if config["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    groups = part["g_idx"].numpy()
    scales = part["scales"].float().numpy().T
    return scales[:, groups] * (codes - zeros[:, groups]).astype(np.float32)


def gptq_settings(config: dict, module: str) -> tuple[int, int, bool]:
    """bits, group_size, sym: what `dynamic` says of a module goes before the rest."""
    import re

    own = dict(config)
    for pattern, values in config.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            assert pattern.startswith("+:"), f"{module} is said to be dense"
            own |= values
    return own["bits"], own["group_size"], own["sym"]
