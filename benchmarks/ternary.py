"""Ternary matrices: bits a weight of the dictionary and of the numeral systems beside the entropy, and their speed.

    python -m benchmarks.ternary [--size 4096] [--repeats 5]

Values are drawn independently, -1 and 1 alike. "matched" is the dictionary of the very shares, "chosen" that which the
writer chooses; "words" are what the numeral systems' streams take, "all" counts a row's states and the blocks' places
besides. The two scales of a row are counted nowhere: 32 bits a row. Speeds are of one core in million weights a second,
the best of a few runs: encoding to a section's parts, decoding stripes to float32 as a product on the CPU does, and
checking what a reader checks first.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.tools import Limits, print_table
from formats.encoding import encoding_of
from formats.encoding.ternary_dict import SHARES
from formats.kernels import ternary
from formats.kernels.cpu_linear import MAX_DECODED_ELEMENTS, hold
from formats.layer import TernaryLinear
from formats.section import pack, part_arrays

# Zero rate -> bits a weight of QMoE's dictionary rebuilt for it, measured independently of this code.
KNOWN = {
    0.33: 1.606,
    0.45: 1.587,
    0.50: 1.550,
    0.60: 1.453,
    0.70: 1.252,
    0.80: 1.009,
    0.857: 0.835,
    0.864: 0.806,
    0.885: 0.733,
    0.886: 0.733,
    0.92: 0.639,
    0.95: None,
    0.99: None,
}
QMOE_RATE = 0.885
HEADER = (
    *("zeros", "entropy", "known", "matched", "chosen", "words", "all"),
    *("dict: encode", "decode", "check", "rANS: encode", "decode", "check"),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix")
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    torch.set_num_threads(1)
    limits = Limits()
    rows = [measure(zeros, known, args.size, args.repeats, limits) for zeros, known in KNOWN.items()]
    print_table(HEADER, rows)
    limits.finish()


def measure(zeros: float, known: float | None, size: int, repeats: int, limits: Limits) -> list[str]:
    """One row of the table, its promises remembered."""
    codes = drawn(zeros, (size, size))
    share = round(SHARES * (1 - zeros) / 2)
    matched = 16 * len(ternary.codewords_of(codes, share, share)[0]) / codes.size
    chosen, speeds = 0.0, []
    words = whole = 0.0
    for coding in ternary.ENCODERS:
        layer = TernaryLinear(codes=codes, scales=np.tile(np.float16([-1, 1]), (size, 1)), coding=coding)
        stream = layer.stream
        if coding == "ternary_dict":
            chosen = 16 * stream.fields["codewords"] / codes.size
        else:
            words = 16 * stream.fields["words"] / codes.size
            whole = 8 * sum(part.nbytes for part in stream.parts.values()) / codes.size
        found = speeds_of(layer, repeats)
        for what, speed, least in zip(("encode", "decode", "check"), found, (20, 200, 200), strict=True):
            limits.at_least(f"{coding}, {zeros:.1%} zeros, {what}: million weights a second", speed, least)
        speeds += found
    entropy = -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
    name = f"{zeros:.1%} zeros"
    if known:
        limits.at_most(f"{name}: matched dictionary beside the known figure", abs(matched / known - 1), 0.02)
    if zeros == QMOE_RATE:
        limits.at_most(f"{name}: bits of the dictionary", chosen, 0.735)
    limits.at_most(f"{name}: words of numeral systems beside the entropy", words / entropy - 1, 0.03)
    bits = [f"{entropy:.4f}", f"{known:.3f}" if known else "", *(f"{b:.4f}" for b in (matched, chosen, words, whole))]
    return [f"{zeros:.1%}", *bits, *(f"{speed:,.0f}" for speed in speeds)]


def drawn(zeros: float, shape: tuple[int, int]) -> np.ndarray:
    """Independent values of this shape, i8."""
    uniform = np.random.default_rng(0).random(shape, np.float32)
    return np.where(uniform < zeros, 0, np.where(uniform < (1 + zeros) / 2, -1, 1)).astype(np.int8)


def speeds_of(layer: TernaryLinear, repeats: int) -> list[float]:
    """Million weights a second: encoded, decoded, checked."""
    encoding, shape, section = encoding_of(layer), layer.shape, bytearray(pack(layer))
    held = hold(torch.frombuffer(section, dtype=torch.uint8), encoding, shape)
    arrays = part_arrays(section, shape, encoding)
    step = max(1, MAX_DECODED_ELEMENTS // shape[1])

    def decode() -> None:
        for row in range(0, shape[0], step):
            encoding.rows(held, slice(row, row + step), shape)

    return [
        layer.codes.size / 1e6 / best_of(function, repeats)
        for function in (
            lambda: ternary.ENCODERS[layer.coding](layer.codes),
            decode,
            lambda: encoding.check_values(arrays, shape),
        )
    ]


def best_of(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run, one more than so many: the first compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
