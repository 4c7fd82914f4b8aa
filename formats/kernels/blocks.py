"""How a product is cut into programs: by the shape alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from formats.kernels.layout import AFFINE, BYTES, DOUBLE_QUANT, PRODUCTS, TRELLIS, TWO_LEVEL, UNIFORM, Layout

FEW_TOKENS = 8
"""The kernel by rows takes so many at most."""
TILES_FROM = 3
"""From so many on, tiles take fewer instructions a weight than rows do (`make kernels`), where there are tiles."""
DECODED_FROM, DECODED_FROM_FLOATS, DECODED_FROM_ORDERED = 65, 33, 3
"""From so many on, a matrix that is decoded once for cuBLAS costs less than tiles (`make bench-gpu`): decoding goes at
the speed of memory, and a tile takes more instructions a weight than its products do; most of all where codes become
floats before they are multiplied, and where every weight looks for its scale."""
LEAST_OF_TENSOR_CORES = 16
MOST_TOKENS = 128
PROGRAMS = 128
"""Wanted at least: about one for each multiprocessor of a large GPU."""
TILE_PROGRAMS = 512
"""Of tiles, which wait at every step: so that a multiprocessor has another to go on with."""
SUMS_BYTES = 1 << 22
"""At most, of all splits: they are read back from the cache."""
MOST_SPLITS = 16
LEAST_INPUTS = 32
LEAST_OF_GROUP, GROUP_INPUTS = 64, 128
"""Inputs of a group at a time: with fewer, scales take more instructions than weights do."""
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


def ceil_div(n: int, size: int) -> int:
    """How many blocks of a size hold n; Triton's own takes microseconds to say so."""
    return -(-n // size)


def blocks_for(layout: Layout, n_tokens: int, n_outputs: int, has_tiles: bool = True) -> Blocks:
    """The blocks for a shape: wide ones, as long as there are programs enough, and inputs split where there are not."""
    if n_tokens >= _decoded_from(layout, has_tiles):
        return DECODED
    by_tiles = has_tiles and n_tokens >= TILES_FROM
    return (tile_for if by_tiles else _rows)(layout, n_tokens, n_outputs)


def _decoded_from(layout: Layout, has_tiles: bool) -> int:
    if not has_tiles:
        return FEW_TOKENS + 1
    if layout.has_order:
        return DECODED_FROM_ORDERED
    return DECODED_FROM if has_whole_codes(layout) else DECODED_FROM_FLOATS


def _rows(layout: Layout, n_tokens: int, n_outputs: int) -> Blocks:
    tokens = triton.next_power_of_2(n_tokens)
    outputs, inputs, warps, wanted = 8, 1024 if tokens < 4 else 512, 4, PROGRAMS
    if layout.kind == TRELLIS:
        outputs, inputs = (128, 32) if tokens < 4 else (32, 64)  # 128: 16 bytes of an input's path
        wanted *= 2  # they wait at every step
    elif layout.kind == BYTES:
        inputs //= 2  # more spills on Turing
    elif layout.has_order:
        inputs //= 2 if tokens == 1 else 4  # a scale and a zero for each weight take registers
    elif tokens == 1:
        warps = 2  # 16 bytes to a thread also of the plane of one bit
        outputs = 4 if layout.bits % 4 == 0 else 8
    return _split(layout, n_outputs, Blocks(tokens, outputs, inputs, 1, warps, 2), 1, wanted)


def tile_for(layout: Layout, n_tokens: int, n_outputs: int) -> Blocks:
    """The blocks of the kernels by tiles and by groups."""
    is_whole = has_whole_codes(layout)
    most = MOST_TOKENS // 2 if is_whole else MOST_TOKENS  # sums of a group, beside those of all
    tokens = min(max(triton.next_power_of_2(n_tokens), LEAST_OF_TENSOR_CORES), most)
    outputs = MOST_TOKENS if tokens == MOST_TOKENS else 32 if layout.scales == PRODUCTS else 64
    inputs, warps = TILE_WEIGHTS // outputs, 8 if tokens >= (32 if layout.scales == DOUBLE_QUANT else 64) else 4
    if layout.scales == TWO_LEVEL and tokens > LEAST_OF_TENSOR_CORES:
        inputs //= 2  # statistics of its groups take registers, and room in shared memory
    if layout.has_order:
        inputs //= 4
    elif is_whole:
        inputs = min(inputs, _inputs_of_group(layout))
    spills = layout.bits == 2 if is_whole else layout.scales == TWO_LEVEL and tokens == MOST_TOKENS
    stages = 2 if spills else 3  # 3 do on Blackwell
    blocks = Blocks(tokens, outputs, inputs, 1, warps, stages)
    return _split(layout, n_outputs, blocks, ceil_div(n_tokens, tokens), TILE_PROGRAMS)


def has_whole_codes(layout: Layout) -> bool:
    """Whether codes can go to the tensor cores as they are (`triton_groups`): some inputs behind each other share a
    group, and a code is one field of a word."""
    is_whole = layout.kind in (UNIFORM, AFFINE) and layout.bits in (2, 4) and not layout.has_order
    return is_whole and _inputs_of_group(layout) >= LEAST_OF_GROUP


def by_groups(layout: Layout, blocks: Blocks, dtype: torch.dtype) -> bool:
    """Whether they do: a tile's inputs are of one group, and activations times their scales stay within their dtype."""
    is_fine = blocks.is_tile and blocks.inputs <= _inputs_of_group(layout) and has_whole_codes(layout)
    return is_fine and (dtype == torch.bfloat16 or (dtype == torch.float16 and not layout.has_input_scales))


def _inputs_of_group(layout: Layout) -> int:
    """The most inputs, a power of two, that always lie in one group."""
    if layout.group_size >= layout.n_inputs:
        return GROUP_INPUTS
    return min(layout.group_size & -layout.group_size, GROUP_INPUTS)


def _split(layout: Layout, n_outputs: int, blocks: Blocks, programs: int, wanted: int) -> Blocks:
    """With as many splits as make programs enough; programs: of each block of outputs."""
    inputs = max(min(blocks.inputs, triton.next_power_of_2(layout.n_inputs)), LEAST_INPUTS)
    most = max(SUMS_BYTES // (4 * programs * blocks.tokens * n_outputs), 1)
    programs *= ceil_div(n_outputs, blocks.outputs)
    splits = min(max(wanted // programs, 1), ceil_div(layout.n_inputs, inputs), MOST_SPLITS, most)
    return Blocks(blocks.tokens, blocks.outputs, inputs, splits, blocks.warps, blocks.stages)
