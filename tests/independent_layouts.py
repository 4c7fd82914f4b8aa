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


def decode_pack_quantized(config: dict, module: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """[out, in] f32"""
    args = pack_quantized_args(config, module)
    bits, (out_features, in_features) = args["num_bits"], tensors[f"{module}.weight_shape"].tolist()
    packed, scales = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"].float().numpy()
    assert packed.shape == (out_features, -(-in_features * bits // 32))
    codes = streams(packed, bits, in_features) - 2 ** (bits - 1)
    size = in_features if args["strategy"] == "channel" else args["group_size"]
    return (scales[:, :, None] * codes.reshape(out_features, -1, size).astype(np.float32)).reshape(codes.shape)


def pack_quantized_args(config: dict, module: str) -> dict:
    """What the one group that has the module says of its weights."""
    import re

    assert config["format"] == "pack-quantized" and module not in config["ignore"]
    groups = config["config_groups"].values()
    found = [
        group["weights"]
        for group in groups
        for target in group["targets"]
        if target == "Linear" or (target.startswith("re:") and re.match(target[3:], module))
    ]
    assert len(found) == 1
    return found[0]


def decode_awq(config: dict, module: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """[out, in] f32"""
    assert module not in config["modules_to_not_convert"]
    packed, zeros = (tensors[f"{module}.{name}"].numpy().astype(np.int64) for name in ("qweight", "qzeros"))
    size = len(packed) if config["group_size"] == -1 else config["group_size"]
    groups = np.arange(len(packed)) // size
    scales = tensors[f"{module}.scales"].float().numpy()
    return np.ascontiguousarray((scales[groups] * (nibbles(packed) - nibbles(zeros)[groups]).astype(np.float32)).T)


def nibbles(words: np.ndarray) -> np.ndarray:
    """[n, words] -> [n, 8 * words]: output j of eight lies in nibble 0, 4, 1, 5, 2, 6, 3, 7."""
    places = [words >> (4 * nibble) & 15 for nibble in (0, 4, 1, 5, 2, 6, 3, 7)]
    return np.stack(places, axis=-1).reshape(len(words), -1)
