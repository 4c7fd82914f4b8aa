"""The checkpoint layout of AutoGPTQ, which AutoRound and GPTQModel write: codes in bit streams along int32 words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.peers.job import Matrix

WORD_BITS = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_checkpoint(folder: Path, bits: int, group_size: int) -> tuple[dict[str, Matrix], int]:
    """The decoded weights by tensor name, [out, in] float32, and the bytes that the linears take in the files."""
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    linears = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    weights: dict[str, Matrix] = {}
    stored_bytes = 0
    for linear in linears:
        parts = {part: tensors[f"{linear}.{part}"] for part in PARTS if f"{linear}.{part}" in tensors}
        weights[f"{linear}.weight"] = decode(parts, bits, group_size)
        stored_bytes += sum(part.nbytes for part in parts.values())
    return weights, stored_bytes


def decode(parts: dict[str, Tensor], bits: int, group_size: int) -> Matrix:
    """One linear, [out, in] float32.

    qweight: [in * bits / 32, out] int32, each column a stream of codes, the first in the lowest bits.
    qzeros: [groups, out * bits / 32] int32, each row such a stream; holds the zero point less one.
    scales: [groups, out]. g_idx: [in], the group of each input; without it groups follow each other.
    """
    codes = unpack_rows(parts["qweight"].T, bits)  # [out, in]
    zeros = (unpack_rows(parts["qzeros"], bits) + 1) % (1 << bits)  # [groups, out]
    scales = parts["scales"].to(torch.float32).numpy()  # [groups, out]
    in_order = np.arange(codes.shape[1]) // group_size
    group = parts["g_idx"].numpy() if "g_idx" in parts else in_order
    difference = codes - zeros.T[:, group]
    return np.asarray(difference * scales.T[:, group], np.float32)


def unpack_rows(words: Tensor, bits: int) -> npt.NDArray[np.int32]:
    """[n, w] int32 -> [n, w * 32 / bits] codes: every row is one stream, in which a code may cross words."""
    octets = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)  # [n, 4 w]
    stream = np.unpackbits(octets, axis=1, bitorder="little")
    lanes = stream.reshape(len(stream), -1, bits).astype(np.int32)  # [n, codes, bits], lowest bit first
    return np.asarray(lanes @ (1 << np.arange(bits, dtype=np.int32)), np.int32)
