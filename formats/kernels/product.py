"""The launches of one product: which kernels, on which grids, and what they hand on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from formats.encoding import Shape
from formats.kernels.blocks import Blocks, by_groups, ceil_div
from formats.kernels.launch import Launch
from formats.kernels.layout import Layout
from formats.kernels.triton_groups import arrange_inputs, multiply_groups
from formats.kernels.triton_rows import add_splits as splits_kernel
from formats.kernels.triton_rows import multiply_rows
from formats.kernels.triton_tiles import add_sparse as sparse_kernel
from formats.kernels.triton_tiles import multiply_tiles

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Of activations, that kernels take."""
SPARSE = 8, 8  # tokens or rows, and outputs or outliers of a row, at a time
ARRANGED_TOKENS = 4
SUMS = 1024
KEPT = 1 << 16
"""Launches: a large model has hundreds of layers, and each its numbers of tokens, or parts that are decoded."""
FUSED = {"enable_fp_fusion": True}  # said, since Triton's default changes with its version


class ProductLaunches(NamedTuple):
    """Of one product, in their order."""

    arrange: Launch | None  # for the kernel by groups, its inputs in the next two shapes
    arranged: Shape
    totals: Shape
    multiply: Launch
    add_sparse: Launch | None  # by tiles; rows take in what is sparse
    add_splits: Launch | None  # to the result; without it the first wrote that


@functools.lru_cache(maxsize=KEPT)
def product_launches(
    layout: Layout,
    offsets: tuple[int, ...],
    y_shape: Shape,
    blocks: Blocks,
    dtype: torch.dtype,
    device: torch.device,  # what is compiled is of one
) -> ProductLaunches:
    n_tokens, n_outputs = y_shape
    numbers: tuple[Any, ...] = (offsets, n_tokens, n_outputs)
    sizes: dict[str, Any] = {"L": layout, "BLOCK_M": blocks.tokens, "BLOCK_N": blocks.outputs, **FUSED}
    options = {
        "BLOCK_K": blocks.inputs,
        "SPLITS": blocks.splits,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    grid: tuple[int, ...] = ceil_div(n_outputs, blocks.outputs), blocks.splits
    kernel: Any = multiply_rows
    n_blocks = ceil_div(layout.n_inputs, blocks.inputs)
    arrange = add_sparse = add_splits = None
    if blocks.is_tile:
        kernel, grid = multiply_tiles, (ceil_div(n_tokens, blocks.tokens), *grid)
        options["DOT"] = _dot_dtype(dtype)
    if by_groups(layout, blocks, dtype):
        kernel, some = multiply_groups, (ceil_div(n_tokens, ARRANGED_TOKENS), n_blocks)
        arranged = {"L": layout, "BLOCK_M": ARRANGED_TOKENS, "BLOCK_K": blocks.inputs, **FUSED}
        arrange = Launch(arrange_inputs, some, (offsets, n_tokens), **arranged)
    is_sparse = blocks.is_tile and layout.is_sparse
    if is_sparse:
        some = ceil_div(n_tokens, SPARSE[0]), ceil_div(n_outputs, SPARSE[1])
        add_sparse = Launch(sparse_kernel, some, numbers, **sizes | {"BLOCK_M": SPARSE[0], "BLOCK_N": SPARSE[1]})
    if is_sparse or blocks.splits > 1:
        add_splits = splits_launch(n_tokens * n_outputs, blocks.splits)
    return ProductLaunches(
        arrange=arrange,
        arranged=(n_tokens, n_blocks * blocks.inputs),
        totals=(n_tokens, n_blocks),
        multiply=Launch(kernel, grid, numbers, **sizes, **options),
        add_sparse=add_sparse,
        add_splits=add_splits,
    )


def splits_launch(n_sums: int, splits: int) -> Launch:
    """Of what adds so many sums of each split to the result."""
    return Launch(splits_kernel, (ceil_div(n_sums, SUMS),), (n_sums,), SPLITS=splits, BLOCK=SUMS, **FUSED)


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """That of the activations; the interpreter would multiply the bits of bfloat16 as integers."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return DTYPES[dtype]
