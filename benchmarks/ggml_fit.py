"""What our blocks lose beside those of ggml's own encoder, given the same importance of inputs; on real weights.

ggml's is called in the library that llama-cpp-python brings along, which `benchmarks.interop_gguf` builds.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, dequantize
from safetensors import safe_open

from benchmarks.peers.environments import interpreter
from benchmarks.tools import Limits, parser, print_table
from formats.ggml.fit import fit
from formats.ggml.types import TYPES

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
LAYERS = ("model.layers.5.mlp.down_proj.weight", "model.layers.20.mlp.down_proj.weight")
SPREAD = 1.5
"""Of the logarithm of an input's importance."""
F32 = npt.NDArray[np.float32]


def main() -> None:
    args = parser(__doc__).parse_args()
    encoder = Ggml(next((interpreter("llama_cpp_engine", args.work.resolve()).parents[1]).rglob("libggml-base.so")))
    rows, limits = [], Limits()
    with safe_open(args.model / "model.safetensors", "pt") as weights:
        for name in LAYERS:
            weight = np.ascontiguousarray(weights.get_tensor(name).float().numpy())
            drawn = np.random.default_rng(0).standard_normal(weight.shape[1])
            importance = np.exp(SPREAD * drawn).astype(np.float32)
            for kind in KINDS:
                theirs = error(weight, encoder.quantize(weight, kind, importance), importance)
                ours = error(weight, fit(weight, kind, importance).values(), importance)
                rows.append((name, kind, f"{theirs:.3e}", f"{ours:.3e}", f"{ours / theirs:.3f}"))
                limits.at_most(f"{name}, {kind}: our error over ggml's", ours / theirs, 1.0)
    print_table(("layer", "type", "ggml", "ours", "ratio"), rows)
    limits.finish()


def error(weight: F32, values: F32, importance: F32) -> float:
    """The share of the energy that is lost, inputs weighted."""
    return float((np.square(weight - values) * importance).sum() / (np.square(weight) * importance).sum())


class Ggml:
    """`ggml_quantize_chunk` of ggml.h."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._quantize = self._library.ggml_quantize_chunk
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self._quantize.restype = ctypes.c_size_t

    def quantize(self, weight: F32, kind: str, importance: F32) -> F32:
        """The values of its blocks."""
        stored = np.zeros((len(weight), TYPES[kind].row_bytes(weight.shape[1])), np.uint8)
        arrays = (weight.ctypes.data, stored.ctypes.data)
        self._library.ggml_quantize_init(TYPES[kind].id)
        self._quantize(TYPES[kind].id, *arrays, 0, *weight.shape, importance.ctypes.data)
        return np.asarray(dequantize(stored, GGMLQuantizationType[kind]), np.float32)


if __name__ == "__main__":
    main()
