"""Which kernel is launched with what: by the shape, so that no first token waits for a search."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape
from formats.kernels import ternary_launch
from formats.kernels.blocks import DECODED, FEW_TOKENS, Blocks, ceil_div
from formats.kernels.launch import Launch
from formats.kernels.layout import Layout, constants, is_ternary, layout_of
from formats.kernels.product import DTYPES, KEPT, SPARSE, product_launches
from formats.kernels.triton_decode import decode_columns, decode_outliers, decode_tiles
from formats.kernels.triton_decode import decode_rows as decode_rows_by_id
from formats.kernels.tuning import choose

AMPERE = 80
DECODED_TILE, DECODED_ROWS = (32, 256), (4, 256)  # rows and inputs
DECODED_WEIGHTS = 1 << 24  # at a time


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
    blocks = blocks or choose(layout, len(x), shape[0], x.device, has_tiles(x.dtype))
    if blocks == DECODED:
        return _multiply_decoded(x, section, encoding, shape)
    launches = product_launches(layout, offsets, (len(x), shape[0]), blocks, x.dtype, x.device)
    y = x.new_empty((len(x), shape[0]))
    sums = y  # where one launch does it all
    if launches.add_splits is not None:
        sums = x.new_empty((blocks.splits, *y.shape), dtype=torch.float32)
    tables = _constants(x.device)
    if launches.arrange is None:
        launches.multiply(x, section, tables, sums)
    else:
        arranged, totals = x.new_empty(launches.arranged), x.new_empty(launches.totals, dtype=torch.float32)
        launches.arrange(x, section, arranged, totals)
        launches.multiply(arranged, totals, section, tables, sums)
    if launches.add_sparse is not None:
        launches.add_sparse(x, section, sums)
    if launches.add_splits is not None:
        launches.add_splits(sums, y)
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
        arguments = (section, _constants(section.device), rows, weight, offsets)
        grid = ceil_div(len(rows), DECODED_ROWS[0]), ceil_div(shape[1], DECODED_ROWS[1])
        with on_device_of(section):
            decode_rows_by_id[grid](*arguments, len(rows), **options, BLOCK_N=DECODED_ROWS[0], BLOCK_K=DECODED_ROWS[1])
            _decode_sparse((*arguments, 0, len(rows)), options | {"HAS_IDS": True})
    return weight


def decode(section: Tensor, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> Tensor:
    """See `Kernels`."""
    weight = torch.empty(shape, dtype=dtype, device=section.device)
    with on_device_of(section):
        if is_ternary(encoding):
            ternary_launch.decode(section, None, encoding, shape, weight)
        else:
            _decode_from(0, weight, section, encoding, shape)
    return weight


def _multiply_decoded(x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """By cuBLAS, with some of the outputs after the other: what is decoded takes little room, and stays in the cache of
    a large GPU.
    """
    step = max(DECODED_WEIGHTS // shape[1] // DECODED_TILE[0], 1) * DECODED_TILE[0]
    y, weight = x.new_empty((len(x), shape[0])), x.new_empty((min(step, shape[0]), shape[1]))
    for first, part in zip(range(0, shape[0], step), y.split(step, dim=1), strict=True):
        decoded = weight[: part.shape[1]]
        _decode_from(first, decoded, section, encoding, shape)
        torch.mm(x, decoded.T, out=part)
    return y


def _decode_from(first_row: int, weight: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> None:
    """Into weight [n, in]: n rows from `first_row` on, a multiple of a tile's."""
    layout, offsets = layout_of(encoding, shape)
    tables, rows = _constants(section.device), (first_row, len(weight))
    _decoder(layout, offsets, rows, weight.dtype, section.device)(section, tables, weight)
    if layout.is_sparse:
        exact = {"L": layout, "enable_fp_fusion": False, "HAS_IDS": False}
        _decode_sparse((section, tables, section, weight, offsets, *rows), exact)


@functools.lru_cache(maxsize=KEPT)
def _decoder(
    layout: Layout,
    offsets: tuple[int, ...],
    rows: tuple[int, int],  # the first, and how many
    dtype: torch.dtype,  # what is compiled is for one, and for one device
    device: torch.device,
) -> Launch:
    n_rows, n_inputs = DECODED_TILE
    if layout.has_order:
        n_inputs //= 2  # a scale and a zero for each weight take registers
    grid = ceil_div(rows[1], n_rows), ceil_div(layout.n_inputs, n_inputs)
    sizes = {"BLOCK_N": n_rows, "BLOCK_K": n_inputs}
    return Launch(decode_tiles, grid, (offsets, *rows), L=layout, enable_fp_fusion=False, **sizes)


def _decode_sparse(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What is stored beside the codes, into what is decoded already; the last argument is its number of rows."""
    layout, grid = options["L"], (ceil_div(arguments[-1], SPARSE[0]),)
    for kernel in [decode_outliers] * layout.has_outliers + [decode_columns] * bool(layout.n_columns):
        kernel[grid](*arguments, **options, BLOCK_N=SPARSE[0], BLOCK_K=SPARSE[1])


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    is_elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if is_elsewhere else nullcontext()


def has_tiles(dtype: torch.dtype) -> bool:
    """Whether Triton reaches tensor cores with such activations: not on Turing, and not without rounding in float32.

    The interpreter takes all.
    """
    if triton.knobs.runtime.interpret:
        return True
    return dtype != torch.float32 and _capability(triton.runtime.driver.active.get_current_device()) >= AMPERE


@functools.cache
def _capability(device: int) -> int:
    """Of the current device, which has this number."""
    return int(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def _warn_of(dtype: torch.dtype) -> None:
    """Once: it is slow, and nobody may have meant it."""
    warnings.warn(f"activations in {dtype}: no GPU kernel takes them; each weight is decoded first", stacklevel=4)


@functools.cache
def _constants(device: torch.device) -> Tensor:
    return torch.tensor(constants(), dtype=torch.float32, device=device)
