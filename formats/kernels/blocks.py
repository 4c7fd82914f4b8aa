"""How a product is cut into programs: by the shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from formats.kernels.layout import BYTES, TRELLIS, TWO_LEVEL, Layout

FEW_TOKENS = 8
"""The kernel by rows takes so many at most."""
TILES_FROM = 3
"""From so many on, tiles take fewer instructions a weight than rows do (`make kernels`), where there are tiles."""
DECODED_FROM = 1024
"""From so many on, a matrix that is decoded once for cuBLAS costs less than tiles that each block of tokens decodes
anew: as many instructions a weight as its products take on tensor cores (`make kernels`)."""
MOST_DECODED = 1 << 27
"""Weights, which take twice the bytes for a moment: nobody has set aside a gigabyte for a head."""
LEAST_OF_TENSOR_CORES = 16
MOST_TOKENS = 128
PROGRAMS = 96
"""Wanted at least: about one for each multiprocessor of a large GPU. More splits would move more sums than codes."""
MOST_SPLITS = 16
LEAST_INPUTS = 32
TILE_WEIGHTS = 8192
"""Of a tile: 64 to a thread, so that a plane of two bits is read 16 bytes to a thread, and 32 with many tokens."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What one program takes, and how many programs share the inputs of an output."""

    tokens: int
    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int

    @property
    def is_tile(self) -> bool:
        """For the tensor cores, else by rows."""
        return self.tokens > FEW_TOKENS


DECODED = Blocks(tokens=0, outputs=0, inputs=0, splits=0, warps=0, stages=0)
"""No blocks: the weight is decoded, and cuBLAS multiplies."""


def blocks_for(layout: Layout, n_tokens: int, n_outputs: int, has_tiles: bool = True) -> Blocks:
    """The blocks for a shape: wide ones, as long as there are programs enough, and inputs split where there are not."""
    if n_tokens > FEW_TOKENS and not has_tiles:
        return DECODED
    if n_tokens >= DECODED_FROM and n_outputs * layout.n_inputs <= MOST_DECODED:
        return DECODED
    by_tiles = has_tiles and n_tokens >= TILES_FROM
    return (tile_for if by_tiles else _rows)(layout, n_tokens, n_outputs)


def _rows(layout: Layout, n_tokens: int, n_outputs: int) -> Blocks:
    tokens = triton.next_power_of_2(n_tokens)
    outputs, inputs, warps = 8, 1024 if tokens < 4 else 512, 4
    if layout.kind == TRELLIS:
        outputs, inputs = (128, 32) if tokens < 4 else (32, 64)  # 128: 16 bytes of an input's path
    elif layout.kind == BYTES:
        inputs //= 2  # more spills on Turing
    elif layout.has_order:
        inputs //= 2 if tokens == 1 else 4  # a scale and a zero for each weight take registers
    elif layout.bits % 2 == 1 and tokens == 1:
        warps = 2  # 16 bytes to a thread also of the plane of one bit
    return _split(layout, n_outputs, Blocks(tokens, outputs, inputs, 1, warps, 2), 1)


def tile_for(layout: Layout, n_tokens: int, n_outputs: int) -> Blocks:
    """The blocks of the kernel by tiles."""
    tokens = min(max(triton.next_power_of_2(n_tokens), LEAST_OF_TENSOR_CORES), MOST_TOKENS)
    outputs, programs = MOST_TOKENS if tokens == MOST_TOKENS else 64, triton.cdiv(n_tokens, tokens)
    while outputs > 32 and programs * triton.cdiv(n_outputs, outputs) < PROGRAMS:
        outputs //= 2
    inputs = TILE_WEIGHTS // outputs
    if layout.scales == TWO_LEVEL and tokens > LEAST_OF_TENSOR_CORES:
        inputs //= 2  # statistics of its groups take registers, and room in shared memory
    if layout.has_order:
        inputs //= 4
    stages = 2 if layout.scales == TWO_LEVEL and tokens == MOST_TOKENS else 3  # 3 spill on Blackwell
    return _split(layout, n_outputs, Blocks(tokens, outputs, inputs, 1, 8 if tokens >= 64 else 4, stages), programs)


def _split(layout: Layout, n_outputs: int, blocks: Blocks, programs: int) -> Blocks:
    """With as many splits as make programs enough; programs: of each block of outputs."""
    inputs = max(min(blocks.inputs, triton.next_power_of_2(layout.n_inputs)), LEAST_INPUTS)
    programs *= triton.cdiv(n_outputs, blocks.outputs)
    splits = min(max(PROGRAMS // programs, 1), triton.cdiv(layout.n_inputs, inputs), MOST_SPLITS)
    return Blocks(blocks.tokens, blocks.outputs, inputs, splits, blocks.warps, blocks.stages)
