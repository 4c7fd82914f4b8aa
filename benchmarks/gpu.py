"""The GPU kernels on a GPU, beside cuBLAS with a plain bf16 weight; says why and does nothing where there is no GPU.

    python -m benchmarks.gpu [--shape 4096 4096] [--tokens 1 16 256] [--warm] [--json] [--seconds 150]

Percent of the memory limit is the least that a product must move (section, activations, result) by the time it took,
over what copying a gigabyte on the same GPU in the same run reaches. Times are of a CUDA graph of calls, each with the
next of up to 64 copies of its weight, so that a large one is no longer in the cache; "from Python" is a call without a
graph. With --warm, what `qtool warm` tries is tried, and the fastest counts (from Python: the first).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.kernels import FEW
from benchmarks.roofline import work_of
from benchmarks.ternary import QMOE_RATE, drawn
from benchmarks.tools import print_table
from formats.encoding import MatrixEncoding, Shape
from formats.kernels.blocks import Blocks
from formats.kernels.layout import is_ternary, layout_of
from formats.kernels.ternary import ENCODERS
from formats.layer import TernaryLinear
from formats.section import pack

DTYPE = torch.bfloat16
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
COPIED_BYTES = 1 << 29
COLUMNS = "tokens", "weight", "ms", "bf16 ms", "speed-up", "of the memory limit", "from Python, ms"
COLD_BYTES = 1 << 28  # several times what the largest cache holds
MOST_COPIES = 64
REPLAYS = 20
PYTHON_CALLS = 5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--warm", action="store_true", help="the fastest of the blocks that `qtool warm` tries")
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
        for row in measure(shape, n_tokens, bytes_per_second, args.warm):
            say(dict(zip(COLUMNS, row, strict=True)) | {"out": shape[0], "in": shape[1]})
            rows.append(row)
    if not args.json:
        print(f"{name}: copies {bytes_per_second / 1e9:.0f} GB/s; weight {shape[0]} x {shape[1]}")
        print_table(COLUMNS, rows)


def print_json(row: dict[str, object]) -> None:
    print(json.dumps(row), flush=True)


def measured_bandwidth() -> float:
    """Bytes read and written a second by a copy; not in a graph, where another engine than the kernels' makes it."""
    from triton.testing import do_bench

    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / float(do_bench(lambda: target.copy_(source), return_mode="median")) * 1e3


def measure(shape: Shape, n_tokens: int, bytes_per_second: float, warm: bool) -> list[tuple[object, ...]]:
    """A row for every encoding; cuBLAS is timed once before and once after, and the faster counts."""
    x = torch.randn((n_tokens, shape[1]), dtype=DTYPE, device="cuda")
    plain = copies(torch.randn(shape, dtype=DTYPE, device="cuda"))
    dense = [functools.partial(torch.matmul, x, weight.T) for weight in plain]
    dense_took, found = milliseconds(dense), []
    for name, encoding, section in sections(shape):
        cold = copies(section)
        ways = [products(x, cold, encoding, shape, blocks) for blocks in tried(encoding, x, shape, warm)]
        took = min(map(milliseconds, ways))
        share = work_of(encoding, shape, n_tokens).floor / (took / 1e3) / bytes_per_second
        found.append((name, took, share, milliseconds_from_python(ways[0])))
    dense_took = min(dense_took, milliseconds(dense))
    ms = "{:.4f}".format
    return [
        (n_tokens, name, ms(took), ms(dense_took), f"{dense_took / took:.2f}", f"{share:.0%}", ms(python))
        for name, took, share, python in found
    ]


def tried(encoding: MatrixEncoding, x: torch.Tensor, shape: Shape, warm: bool) -> Sequence[Blocks | None]:
    """Blocks to measure; None: those that are chosen."""
    from formats.kernels import triton_launch, tuning

    if is_ternary(encoding) or not warm:
        return [None]
    return tuning.candidates(layout_of(encoding, shape)[0], len(x), shape[0], triton_launch.has_tiles(x.dtype))


def products(
    x: torch.Tensor, cold: Sequence[torch.Tensor], encoding: MatrixEncoding, shape: Shape, blocks: Blocks | None
) -> list[Callable[[], torch.Tensor]]:
    """A call for each section."""
    from formats.kernels.triton_launch import multiply, multiply_with

    if blocks is None:
        return [functools.partial(multiply, x, section, encoding, shape) for section in cold]
    return [functools.partial(multiply_with, x, section, encoding, shape, blocks) for section in cold]


def copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    """As many of it as no cache holds together."""
    n = min(max(COLD_BYTES // tensor.nbytes, 1), MOST_COPIES)
    return [tensor, *(tensor.clone() for _ in range(n - 1))]


def milliseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of the calls on the GPU, which gets all of them at once: the median of some runs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiled, before it is recorded
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    found = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(found)


def milliseconds_from_python(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of the calls, made one after the other, until the GPU is done."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(PYTHON_CALLS):
        for call in calls:
            call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3 / (PYTHON_CALLS * len(calls))


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


if __name__ == "__main__":
    main()
