"""Random layers through the interpreted GPU kernels, against numpy and float64: what the fixed cases may have missed.

    python -m benchmarks.kernel_sweep [--seconds 120] [--seed 0]

Shapes from 1 to 300, every encoding with random fields, 1 to 80 tokens. Decoding must give the reference's bits, and a
product in float32 must be within 1e-4 of the largest one. It stops at the first that does not, and names its seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
WITHIN = 1e-4


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=120)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests/formats")]
    started, seed, worst = time.perf_counter(), args.seed, 0.0
    while time.perf_counter() - started < args.seconds:
        worst = max(worst, check(seed))
        seed += 1
    print(f"{seed - args.seed} layers, seeds {args.seed} to {seed - 1}: all decode to the same bits; ", end="")
    print(f"products differ by {worst:.1e} of the largest at most")


def check(seed: int) -> float:
    """The largest difference of a product, relative to the largest value; SystemExit when something is wrong."""
    from formats.encoding import encoding_of
    from formats.kernels import reference, triton_launch
    from formats.section import pack

    layer, n_tokens = random_layer(np.random.default_rng(seed))
    encoding, shape = encoding_of(layer), layer.shape
    section = torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8)
    want = reference.decode(section, encoding, shape, torch.float32)
    if not torch.equal(triton_launch.decode(section, encoding, shape, torch.float32), want):
        raise SystemExit(f"seed {seed}: {encoding} {shape}: decodes to other bits")
    x = torch.randn((n_tokens, shape[1]), generator=torch.Generator().manual_seed(seed))
    exact = x.double() @ want.double().T
    scale = float((x.double().abs() @ want.double().abs().T).max()) or 1.0
    apart = float((triton_launch.multiply(x, section, encoding, shape) - exact).abs().max()) / scale
    if not apart <= WITHIN:
        raise SystemExit(f"seed {seed}: {encoding} {shape}, {n_tokens} tokens: off by {apart:.1e} of the largest")
    return apart


def random_layer(rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """A layer of any encoding, and a number of tokens."""
    from format_samples import make_layer
    from layer_samples import (
        make_affine,
        make_codebook,
        make_int8,
        make_spqr,
        make_ternary,
        make_trellis,
        with_order,
        with_outliers,
    )

    def one_of(*values: object) -> object:
        return values[rng.integers(len(values))]

    n, k = int(rng.integers(1, 300)), int(rng.integers(1, 300))
    bits, group, scaled = int(rng.integers(2, 9)), int(rng.integers(8, 2 * k + 9)), bool(rng.integers(2))
    group = min(group, k)
    kind = one_of("uniform", "spqr", "codebook", "int8", "trellis", "ternary_dict", "ternary_rans", "affine")
    if kind == "uniform":
        layer = make_layer(n, k, bits, group, symmetric=bool(rng.integers(2)), scaled=scaled)
    elif kind == "spqr":
        layer = make_spqr(n, k, bits, group, stat_bits=int(rng.integers(2, 9)), scaled=scaled)
    elif kind == "codebook":
        levels, statistics = one_of("nf4", "fp4", "fitted"), one_of("fp16", "double_quant", "two_level")
        options = () if statistics == "fp16" else (statistics,)
        layer = make_codebook(n, k, bits if levels == "fitted" else 4, group, levels, *options, scaled=scaled)
    elif kind == "int8":
        layer = make_int8(n, k, tuple(sorted({int(c) for c in rng.integers(0, k, rng.integers(0, 5))})))
    elif kind in ("ternary_dict", "ternary_rans"):
        layer = make_ternary(n, k, int(rng.integers(1, 60)), kind, scaled)
    elif kind == "affine":
        statistics = (int(rng.integers(2, 9)), int(rng.integers(1, 20))) if scaled else ()
        layer = make_affine(n, k, bits, group, scaled and bool(rng.integers(2)), *statistics)
    else:
        layer = make_trellis(n, k, int(rng.integers(1, 7)), group, memory=int(rng.integers(2, 10)), scaled=scaled)
    if kind in ("uniform", "spqr") and rng.integers(4) == 0:
        layer = with_order(layer, step=next(step for step in (7, 11, 13) if k % step))
    if kind not in ("int8", "ternary_dict", "ternary_rans", "affine") and rng.integers(3) == 0:
        layer = with_outliers(layer, every=int(rng.integers(2, 60)))
    return layer, int(one_of(1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 80))


if __name__ == "__main__":
    main()
