"""Which kernel is launched with what: by the shape, so that no first token waits for a search."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape
from formats.kernels import ternary_launch
from formats.kernels.blocks import DECODED, FEW_TOKENS, Blocks
from formats.kernels.layout import constants, is_ternary, layout_of
from formats.kernels.triton_decode import decode_columns, decode_outliers, decode_tiles
from formats.kernels.triton_decode import decode_rows as decode_rows_by_id
from formats.kernels.triton_rows import add_splits, multiply_rows
from formats.kernels.triton_tiles import add_sparse, multiply_tiles
from formats.kernels.tuning import choose

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Of activations, that kernels take."""
AMPERE = 80
SPARSE = 8, 8  # tokens or rows, and outputs or outliers of a row, at a time
DECODED_TILE, DECODED_ROWS = (32, 256), (4, 256)  # rows and inputs
SUMS = 1024
FUSED = {"enable_fp_fusion": True}  # said, since Triton's default changes with its version


def multiply(x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """See `Kernels`."""
    with on_device_of(x):
        if len(x) == 0:
            return x.new_empty((0, shape[0]))
        if x.dtype not in DTYPES:
            _warn_of(x.dtype)
            return x @ decode(section, encoding, shape, torch.float32).to(x.dtype).T
        if is_ternary(encoding):
            if len(x) > FEW_TOKENS:
                return x @ decode(section, encoding, shape, x.dtype).T
            return ternary_launch.multiply(x, section, encoding, shape)
        return multiply_with(x, section, encoding, shape)


def multiply_with(
    x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape, blocks: Blocks | None = None
) -> Tensor:
    """As `multiply`, of at least one token and by a kernel of its own; blocks: others than those that are chosen."""
    layout, offsets = layout_of(encoding, shape)
    n_tokens, n_outputs = len(x), shape[0]
    is_sparse = layout.has_outliers or layout.n_columns > 0
    blocks = blocks or choose(layout, n_tokens, n_outputs, x.device, has_tiles(x.dtype))
    if blocks == DECODED:
        return x @ decode(section, encoding, shape, x.dtype).T
    y = x.new_empty((n_tokens, n_outputs))
    sums = y  # where one launch does it all
    if blocks.splits > 1 or (is_sparse and blocks.is_tile):
        sums = x.new_empty((blocks.splits, n_tokens, n_outputs), dtype=torch.float32)
    arguments = (x, section, _constants(x.device), sums, offsets, n_tokens, n_outputs)
    sizes: dict[str, Any] = {"L": layout, "BLOCK_M": blocks.tokens, "BLOCK_N": blocks.outputs, **FUSED}
    options = {
        "BLOCK_K": blocks.inputs,
        "SPLITS": blocks.splits,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    grid = triton.cdiv(n_outputs, blocks.outputs), blocks.splits
    if not blocks.is_tile:
        multiply_rows[grid](*arguments, **sizes, **options)
    else:
        tiles = triton.cdiv(n_tokens, blocks.tokens), *grid
        multiply_tiles[tiles](*arguments, **sizes, DOT=_dot_dtype(x.dtype), **options)
        if is_sparse:
            sizes |= {"BLOCK_M": SPARSE[0], "BLOCK_N": SPARSE[1]}
            some = triton.cdiv(n_tokens, SPARSE[0]), triton.cdiv(n_outputs, SPARSE[1])
            add_sparse[some](x, section, sums, offsets, n_tokens, n_outputs, **sizes)
    if sums is not y:
        add_splits[(triton.cdiv(y.numel(), SUMS),)](sums, y, y.numel(), SPLITS=blocks.splits, BLOCK=SUMS, **FUSED)
    return y


def decode_rows(section: Tensor, rows: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """See `Kernels`."""
    torch._assert_async(((rows >= 0) & (rows < shape[0])).all())
    weight = torch.empty((len(rows), shape[1]), device=section.device)
    if len(rows) and is_ternary(encoding):
        with on_device_of(section):
            ternary_launch.decode(section, rows, encoding, shape, weight)
    elif len(rows):
        layout, offsets = layout_of(encoding, shape)
        options = {"L": layout, "enable_fp_fusion": False}
        arguments = (section, _constants(section.device), rows, weight, offsets, len(rows))
        grid = triton.cdiv(len(rows), DECODED_ROWS[0]), triton.cdiv(shape[1], DECODED_ROWS[1])
        with on_device_of(section):
            decode_rows_by_id[grid](*arguments, **options, BLOCK_N=DECODED_ROWS[0], BLOCK_K=DECODED_ROWS[1])
            _decode_sparse(arguments, options | {"HAS_IDS": True})
    return weight


def decode(section: Tensor, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> Tensor:
    """See `Kernels`."""
    weight = torch.empty(shape, dtype=dtype, device=section.device)
    if is_ternary(encoding):
        with on_device_of(section):
            ternary_launch.decode(section, None, encoding, shape, weight)
        return weight
    layout, offsets = layout_of(encoding, shape)
    constants = _constants(section.device)
    rows, inputs = DECODED_TILE
    if layout.has_order:
        inputs //= 2  # a scale and a zero for each weight take registers
    grid = triton.cdiv(shape[0], rows), triton.cdiv(shape[1], inputs)
    exact = {"L": layout, "enable_fp_fusion": False}
    with on_device_of(section):
        decode_tiles[grid](section, constants, weight, offsets, shape[0], **exact, BLOCK_N=rows, BLOCK_K=inputs)
        _decode_sparse((section, constants, section, weight, offsets, shape[0]), exact | {"HAS_IDS": False})
    return weight


def _decode_sparse(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What is stored beside the codes, into what is decoded already; the last argument is its number of rows."""
    layout, grid = options["L"], (triton.cdiv(arguments[-1], SPARSE[0]),)
    for kernel in [decode_outliers] * layout.has_outliers + [decode_columns] * bool(layout.n_columns):
        kernel[grid](*arguments, **options, BLOCK_N=SPARSE[0], BLOCK_K=SPARSE[1])


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def has_tiles(dtype: torch.dtype) -> bool:
    """Whether Triton reaches tensor cores with such activations: not on Turing, and not without rounding in float32.

    The interpreter takes all.
    """
    if triton.knobs.runtime.interpret:
        return True
    return dtype != torch.float32 and bool(triton.runtime.driver.active.get_current_target().arch >= AMPERE)


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """That of the activations; the interpreter would multiply the bits of bfloat16 as integers."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return DTYPES[dtype]


@functools.cache
def _warn_of(dtype: torch.dtype) -> None:
    """Once: it is slow, and nobody may have meant it."""
    warnings.warn(f"activations in {dtype}: no GPU kernel takes them; each weight is decoded first", stacklevel=4)


@functools.cache
def _constants(device: torch.device) -> Tensor:
    return torch.tensor(constants(), dtype=torch.float32, device=device)
