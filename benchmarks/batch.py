"""Experts solved together against one at a time: the same codes, and how many times as fast.

python -m benchmarks.batch [--experts 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.tools import Limits, print_table
from calibration.hessian import HessianAccumulator, LayerStats
from qtool.factor import factorize
from qtool.gptq import Solution, gptq_quantize
from qtool.gptq_batch import gptq_quantize_all
from qtool.numerics import exact_float32
from qtool.recipe import QuantSpec

OUT, IN, TOKENS = 256, 512, 1024
_ROWS = {"group_size": -1, "percdamp": 0.1, "act_order": False, "input_scales": False, "scale_search": False}
RECIPES = {
    "as QMoE: rows of 2 bits, no search": (QuantSpec(bits=2, **_ROWS), 5.0),
    "as QMoE: ternary": (QuantSpec(bits=2, format="ternary", **_ROWS), 5.0),
    "the default: groups of 128, searched": (QuantSpec(bits=4), None),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    torch.manual_seed(0)
    weights = [torch.randn(OUT, IN) for _ in range(args.experts)]
    stats = [_statistics() for _ in range(args.experts)]
    limits, rows = Limits(), []
    for name, (spec, least) in RECIPES.items():
        alone, together = times(weights, stats, spec, args.repeats)
        ratio = alone / together
        promise = "" if least is None else limits.at_least(f"{name}: times as fast", ratio, least)
        rows.append((name, f"{alone:.2f} s", f"{together:.2f} s", f"{ratio:.1f}", promise))
    print_table((f"{args.experts} experts of {OUT}x{IN}", "one at a time", "together", "ratio", "at least"), rows)
    limits.finish()


def _statistics() -> LayerStats:
    """Of correlated inputs."""
    accumulator = HessianAccumulator(IN)
    accumulator.add(torch.randn(TOKENS, IN) @ (torch.eye(IN) + 0.1 * torch.randn(IN, IN)))
    return accumulator.result()


def times(weights: list[torch.Tensor], stats: list[LayerStats], spec: QuantSpec, repeats: int) -> tuple[float, float]:
    """Median seconds of both ways, taken in turn; stops where their codes differ."""

    def alone() -> list[Solution]:
        return [
            gptq_quantize(w, factorize(own, [w], spec, "expert"), spec) for w, own in zip(weights, stats, strict=True)
        ]

    def together() -> list[Solution]:
        return [solution for solution, _ in gptq_quantize_all(weights, stats, spec)]

    with exact_float32():
        for one, other in zip(alone(), together(), strict=True):
            np.testing.assert_array_equal(one.layer.codes, other.layer.codes)  # type: ignore[attr-defined]
        found = [[seconds_of(way) for way in (alone, together)] for _ in range(repeats)]
    return statistics.median(row[0] for row in found), statistics.median(row[1] for row in found)


def seconds_of(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
