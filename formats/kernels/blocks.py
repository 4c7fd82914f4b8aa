"""How a product is cut into programs: by the shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from formats.kernels.layout import BYTES, TABLE, TRELLIS, Layout

FEW_TOKENS = 8
"""Up to so many are multiplied row by row: tensor cores would have next to nothing to do."""
PROGRAMS = 96
"""Wanted at least: about one for each multiprocessor of a large GPU. More splits would move more sums than codes."""
MOST_SPLITS = 16
LEAST_INPUTS = 32


@dataclass(frozen=True, slots=True)
class Blocks:
    """What one program takes, and how many programs share the inputs of an output."""

    tokens: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


def blocks_for(layout: Layout, n_tokens: int, n_outputs: int) -> Blocks:
    """The blocks for a shape: wide ones, as long as there are programs enough, and inputs split where there are not."""
    few = n_tokens <= FEW_TOKENS
    if few:
        tokens = triton.next_power_of_2(n_tokens)
        outputs, inputs, warps, stages = 8, 1024 if tokens < 4 else 512, 4, 2
    else:
        tokens = min(triton.next_power_of_2(n_tokens), 128)
        outputs, inputs, warps, stages = 128 if tokens == 128 else 64, 64, 8 if tokens == 128 else 4, 3
    if few and layout.kind == TRELLIS:
        outputs, inputs = (128, 32) if tokens < 4 else (32, 64)  # 128: 16 bytes of an input's path
    if layout.kind == BYTES and (few or tokens == 128):
        inputs //= 2  # more spills on Turing, and on Blackwell
    if layout.kind == TABLE and tokens == 128:
        stages = 2  # likewise
    while outputs > 32 and triton.cdiv(n_tokens, tokens) * triton.cdiv(n_outputs, outputs) < PROGRAMS:
        outputs //= 2
    inputs = max(min(inputs, triton.next_power_of_2(layout.n_inputs)), LEAST_INPUTS)
    programs = triton.cdiv(n_tokens, tokens) * triton.cdiv(n_outputs, outputs)
    splits = min(max(PROGRAMS // programs, 1), triton.cdiv(layout.n_inputs, inputs), MOST_SPLITS)
    return Blocks(tokens, outputs, inputs, splits, warps, stages)
