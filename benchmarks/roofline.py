"""What a launch of the GPU kernels must move and compute, and what that would take: a prediction, not a measurement.

    python -m benchmarks.roofline [--shape 4096 4096] [--bits 4] [--group-size 128]

Bytes and operations are counted from a launch's own arguments; divided by the datasheet's limits of each GPU they give
a time that no kernel can beat, and the most that a file of so many bits can gain over fp16. Beside it stands what
MARLIN (arXiv 2408.11743) reports for 4.125 bits on an A10: nearly the ideal 3.87 up to 16 tokens. Fails when a launch
with any encoding and up to 32 tokens, but for what is decoded for cuBLAS, counts more than 5 % above the floor:
activations, the section and the result, each once. That kernels read the section once is what
`tests/formats/test_kernel_reads.py` counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.kernels import FEW, TERNARY
from benchmarks.tools import Limits, print_table
from formats.encoding import MatrixEncoding, Shape, Uniform
from formats.kernels.blocks import DECODED, FEW_TOKENS, Blocks, blocks_for, ceil_div
from formats.kernels.layout import is_ternary, layout_of


@dataclass(frozen=True, slots=True)
class Gpu:
    """Datasheet limits: memory in bytes a second, fp16 tensor cores in operations a second, dense."""

    name: str
    bytes_per_second: float
    operations_per_second: float


GPUS = (
    Gpu("T4", 320e9, 65e12),
    Gpu("A10", 600e9, 125e12),
    Gpu("RTX 4090", 1008e9, 165e12),
    Gpu("A100", 1555e9, 312e12),
    Gpu("H100", 3350e9, 989e12),
)
MARLIN = 3.87, 16  # times fp16, up to so many tokens
FEW_ENOUGH = 32  # tokens: where memory decides
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
HALF = 2  # bytes of an activation


@dataclass(frozen=True, slots=True)
class Work:
    """Of one product, all launches of it together."""

    bytes_moved: int
    floor: int
    operations: int
    bytes_before: int = 0  # of those moved, by a launch that is done before the products begin

    def seconds(self, gpu: Gpu) -> float:
        """The longer of moving and computing."""
        before, moved = self.bytes_before, self.bytes_moved - self.bytes_before
        return before / gpu.bytes_per_second + max(
            moved / gpu.bytes_per_second, self.operations / gpu.operations_per_second
        )


def work_of(encoding: MatrixEncoding, shape: Shape, n_tokens: int) -> Work:
    """What `triton_launch.multiply` moves: the section for every block of tokens.

    Activations are small, and count once: all programs but the first find them in the cache. So are found, and do not
    count, the sums of splits (`blocks.SUMS_BYTES`) and the activations as the kernel by groups has them arranged.
    """
    blocks = _blocks(encoding, shape, n_tokens)
    once = encoding.section_bytes(shape) + HALF * n_tokens * shape[1]
    written, operations = HALF * n_tokens * shape[0], 2 * n_tokens * shape[0] * shape[1]
    if blocks == DECODED:
        weight = HALF * shape[0] * shape[1]
        before = encoding.section_bytes(shape) + weight
        return Work(once + 2 * weight + written, once + written, operations, before)
    again = (ceil_div(n_tokens, blocks.tokens) - 1) * encoding.section_bytes(shape)  # by every block of tokens
    return Work(once + again + written, once + written, operations)


def _blocks(encoding: MatrixEncoding, shape: Shape, n_tokens: int) -> Blocks:
    """Ternary kernels have none but for the number of tokens: a program has all of a row, or of a segment of it."""
    if not is_ternary(encoding):
        return blocks_for(layout_of(encoding, shape)[0], n_tokens, shape[0])
    if n_tokens > FEW_TOKENS:
        return DECODED
    splits = -(-shape[1] // getattr(encoding, "segment", shape[1]))
    return Blocks(tokens=n_tokens, outputs=1, inputs=shape[1], splits=splits, warps=1, stages=1)


def dense_seconds(shape: Shape, n_tokens: int, gpu: Gpu) -> float:
    """Of the same product with a plain fp16 weight."""
    moved = HALF * (shape[0] * shape[1] + n_tokens * (shape[0] + shape[1]))
    return max(moved / gpu.bytes_per_second, 2 * n_tokens * shape[0] * shape[1] / gpu.operations_per_second)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--group-size", type=int, default=128)
    args = options.parse_args()
    shape = tuple(args.shape)
    encoding = Uniform(bits=args.bits, group_size=args.group_size, symmetric=False, input_scales=True)
    limits, rows = Limits(), []
    for n_tokens in TOKENS:
        work = work_of(encoding, shape, n_tokens)
        over = work.bytes_moved / work.floor - 1
        gains = [f"{dense_seconds(shape, n_tokens, gpu) / work.seconds(gpu):.2f}" for gpu in GPUS]
        marlin = MARLIN[0] if n_tokens <= MARLIN[1] else ""
        rows.append((n_tokens, f"{work.bytes_moved / 1e6:.2f} MB", f"{over:.1%}", *gains, marlin))
    print(f"prediction: {encoding}, {shape[0]} x {shape[1]}; speed-up over fp16 at the datasheet's limits")
    print_table(("tokens", "moved", "above the floor", *(gpu.name for gpu in GPUS), "MARLIN, A10"), rows)
    for name, each in (FEW | TERNARY).items():
        for n_tokens in (n for n in TOKENS if n <= FEW_ENOUGH and _blocks(each, shape, n) != DECODED):
            work = work_of(each, shape, n_tokens)
            limits.at_most(f"{name}, {n_tokens} tokens: bytes above the floor", work.bytes_moved / work.floor - 1, 0.05)
    limits.finish()


if __name__ == "__main__":
    main()
