"""The GPU kernels on a GPU, beside cuBLAS with a plain fp16 weight; says why and does nothing where there is no GPU.

    python -m benchmarks.gpu [--shape 4096 4096] [--tokens 1 16 256] [--json] [--seconds 150]

Percent of the memory limit is the least that a product must move (section, activations, result) by the time it took,
over what copying a gigabyte on the same GPU in the same run reaches.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import FEW
from benchmarks.roofline import work_of
from benchmarks.ternary import QMOE_RATE, drawn
from benchmarks.tools import print_table
from formats.encoding import MatrixEncoding, Shape
from formats.kernels.ternary import ENCODERS
from formats.layer import TernaryLinear
from formats.section import pack

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
COPIED_BYTES = 1 << 29
COLUMNS = "tokens", "weight", "ms", "fp16 ms", "speed-up", "of the memory limit"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--json", action="store_true", help="a line of JSON for each row, as soon as it is measured")
    options.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no other number of tokens after this"
    )
    args = options.parse_args()
    started = time.perf_counter()
    if not torch.cuda.is_available():
        print("skipped: torch finds no GPU here")
        return
    shape = tuple(args.shape)
    bytes_per_second = measured_bandwidth()
    name = torch.cuda.get_device_name()
    say = print_json if args.json else lambda row: None
    say({"gpu": name, "bytes_per_second": bytes_per_second})
    rows = []
    for n_tokens in args.tokens:
        if time.perf_counter() - started > args.seconds:
            say({"left_out": n_tokens})
            continue
        for row in measure(shape, n_tokens, bytes_per_second):
            say(dict(zip(COLUMNS, row, strict=True)) | {"out": shape[0], "in": shape[1]})
            rows.append(row)
    if not args.json:
        print(f"{name}: copies {bytes_per_second / 1e9:.0f} GB/s; weight {shape[0]} x {shape[1]}")
        print_table(COLUMNS, rows)


def print_json(row: dict[str, object]) -> None:
    print(json.dumps(row), flush=True)


def measured_bandwidth() -> float:
    """Bytes read and written a second by a copy."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / milliseconds(lambda: target.copy_(source)) * 1e3


def measure(shape: Shape, n_tokens: int, bytes_per_second: float) -> list[tuple[object, ...]]:
    """A row for every encoding; cuBLAS is timed once before and once after, and the faster counts."""
    from formats.kernels import triton_launch

    x = torch.randn((n_tokens, shape[1]), dtype=torch.float16, device="cuda")
    weight = torch.randn(shape, dtype=torch.float16, device="cuda")
    dense = milliseconds(lambda: x @ weight.T)
    found = []
    for name, encoding, section in sections(shape):
        took = milliseconds(
            lambda section=section, encoding=encoding: triton_launch.multiply(x, section, encoding, shape)
        )  # type: ignore[misc]
        share = work_of(encoding, shape, n_tokens).floor / (took / 1e3) / bytes_per_second
        found.append((name, took, share))
    dense = min(dense, milliseconds(lambda: x @ weight.T))
    return [
        (n_tokens, name, f"{took:.4f}", f"{dense:.4f}", f"{dense / took:.2f}", f"{share:.0%}")
        for name, took, share in found
    ]


@functools.cache
def sections(shape: Shape) -> list[tuple[str, MatrixEncoding, torch.Tensor]]:
    """(name, encoding, section on the GPU) of everything that is measured."""
    found = [(name, encoding, random_section(encoding, shape).cuda()) for name, encoding in FEW.items()]
    values = drawn(QMOE_RATE, shape)
    for coding in ENCODERS:  # streams, which no random bytes are
        layer = TernaryLinear(codes=values, scales=np.tile(np.float16([-1, 1]), (shape[0], 1)), coding=coding)
        section = torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8).cuda()
        found.append((f"{coding}, {QMOE_RATE:.1%} zeros", layer.encoding, section))
    return found


def random_section(encoding: MatrixEncoding, shape: Shape) -> torch.Tensor:
    """Bytes of the right length: codes at random, floats small, outliers in order."""
    rng = np.random.default_rng(0)
    section = np.zeros(encoding.section_bytes(shape), np.uint8)
    for part in encoding.parts(shape):
        view = section[part.offset_bytes : part.end_bytes].view(part.dtype).reshape(part.shape)
        if part.dtype in ("<f2", "<f4"):
            view[...] = rng.normal(0, 0.02, part.shape)
        elif part.name == "outlier_rows":
            view[...] = np.linspace(0, getattr(encoding, "outliers", 0), part.shape[0])
        elif part.name == "input_order":
            view[...] = rng.permutation(shape[1])
        elif part.name in ("outlier_columns", "columns"):
            view[...] = np.sort(rng.integers(0, shape[1], part.shape))
        else:
            view[...] = rng.integers(0, np.iinfo(part.dtype).max, part.shape)
    return torch.from_numpy(section)


def milliseconds(run: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


if __name__ == "__main__":
    main()
