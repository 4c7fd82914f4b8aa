"""Decode only: the plain matrix, bit for bit that of `formats.layer` in float32 and rounded once to other dtypes.

Compiled without fused multiply-adds, which would round once where SPEC 7.6.2 rounds twice.
"""

import triton
import triton.language as tl

from formats.kernels.layout import AFFINE as _AFFINE
from formats.kernels.layout import BYTES as _BYTES
from formats.kernels.layout import TRELLIS as _TRELLIS
from formats.kernels.layout import UNIFORM as _UNIFORM
from formats.kernels.triton_codes import look_up, outlier_range, outliers_at, trellis_code_at, units_of
from formats.kernels.triton_planes import code_at, part, small_float
from formats.kernels.triton_statistics import (
    group_at,
    input_scales_of,
    minima_of,
    scaled,
    scales_from,
    scales_of,
    with_minima,
    zeros_of,
)

BYTES, TRELLIS, UNIFORM = tl.constexpr(_BYTES), tl.constexpr(_TRELLIS), tl.constexpr(_UNIFORM)
AFFINE = tl.constexpr(_AFFINE)


@triton.jit
def output_rows(ids, first_row, n_rows, HAS_IDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows of the result, rows of the weight: by their ids or from `first_row` on, which of them exist)."""
    to = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = to < n_rows
    rows = tl.load(ids + to, mask=keep, other=0).to(tl.int32) if HAS_IDS else to + first_row
    return to.to(tl.int64), rows, keep


@triton.jit
def weights_at(section, tables, offsets, rows, columns, keep, L: tl.constexpr):
    """Decoded weights wherever they are, neither outliers nor input scales counted in; not of BYTES.  -> f32"""
    groups = group_at(section, offsets, columns, keep, L)
    if L.kind == TRELLIS:
        codes = trellis_code_at(section, offsets, rows, columns, keep, L)
    else:
        codes = code_at(section, offsets, rows.to(tl.int64), columns, keep, L.n_inputs, L.bits, 0)
    if L.kind == UNIFORM:
        units = small_float(codes) - zeros_of(section, offsets, rows, groups, keep, L)
    elif L.kind == AFFINE:
        units = small_float(codes) - ((1 << (L.bits - 1)) if L.symmetric else 0)
    else:
        units = look_up(section, tables, offsets, codes, L)
    weights = units * scales_of(section, tables, offsets, rows, groups, keep, L)
    if L.has_minima:
        weights += minima_of(section, offsets, rows, groups, keep, L)
    return weights


@triton.jit
def decode_tiles(
    section, tables, weight, offsets, first_row, n_rows, L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows [n_rows, in] of the weight from `first_row` on, a multiple of BLOCK_N, without outliers and columns of
    values; grid: [n_rows / BLOCK_N, in / BLOCK_K]."""
    to = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, keep = first_row + to, to < n_rows
    first = tl.program_id(1) * BLOCK_K
    inputs = first + tl.arange(0, BLOCK_K)
    inside = inputs < L.n_inputs
    units = units_of(section, tables, offsets, rows, keep, first, L, BLOCK_K, False)
    values = scaled(units, scales_from(section, tables, offsets, rows, keep, first, L, BLOCK_K), L)
    values = with_minima(values, section, offsets, rows, keep, first, L)
    if L.has_input_scales:
        values *= input_scales_of(section, offsets, inputs, inside, L)[None, :]
    at = weight + to[:, None].to(tl.int64) * L.n_inputs + inputs[None, :]
    tl.store(at, values.to(weight.dtype.element_ty), mask=keep[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n_rows"])  # one compilation for any number
def decode_rows(
    section, tables, ids, weight, offsets, n_rows,
    L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of the weight by their ids, as `decode_tiles`; grid: [ids / BLOCK_N, in / BLOCK_K]."""
    to, rows, keep = output_rows(ids, 0, n_rows, True, BLOCK_N)
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = inputs < L.n_inputs
    there = keep[:, None] & inside[None, :]
    row, column = rows[:, None] + inputs[None, :] * 0, inputs[None, :] + rows[:, None] * 0
    if L.kind == BYTES:
        at = part(section, offsets[0], tl.int8) + row.to(tl.int64) * L.n_inputs + column
        scales = scales_of(section, tables, offsets, row, column * 0, there, L)
        values = tl.load(at, mask=there, other=0).to(tl.float32) * scales
    else:
        values = weights_at(section, tables, offsets, row, column, there, L)
    if L.has_input_scales:
        values *= input_scales_of(section, offsets, inputs, inside, L)[None, :]
    tl.store(weight + to[:, None] * L.n_inputs + inputs[None, :], values.to(weight.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["first_row", "n_rows"])  # one compilation for any numbers
def decode_outliers(
    section, tables, ids, weight, offsets, first_row, n_rows,
    L: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every weight [n_rows, in] that has an outlier, anew, with the outlier; grid: [n_rows / BLOCK_N]."""
    to, rows, keep = output_rows(ids, first_row, n_rows, HAS_IDS, BLOCK_N)
    first, stop = outlier_range(section, offsets, rows, keep, L)
    for start in range(0, tl.max(stop - first).to(tl.int32), BLOCK_K):
        at = first[:, None] + start + tl.arange(0, BLOCK_K)[None, :]
        there = at < stop[:, None]
        columns, added = outliers_at(section, offsets, at, there, L)
        values = weights_at(section, tables, offsets, rows[:, None] + columns * 0, columns, there, L) + added
        if L.has_input_scales:
            values *= input_scales_of(section, offsets, columns, there, L)
        tl.store(weight + to[:, None] * L.n_inputs + columns, values.to(weight.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["first_row", "n_rows"])  # one compilation for any numbers
def decode_columns(
    section, tables, ids, weight, offsets, first_row, n_rows,
    L: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The inputs that have values of their own (SPEC 7.13); grid: [n_rows / BLOCK_N]."""
    to, rows, keep = output_rows(ids, first_row, n_rows, HAS_IDS, BLOCK_N)
    for start in range(0, L.n_columns, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        there = keep[:, None] & (at < L.n_columns)[None, :]
        columns = tl.load(part(section, offsets[L.at_columns], tl.uint32) + at, mask=at < L.n_columns, other=0)
        read = part(section, offsets[L.at_columns + 1], tl.float16) + rows[:, None].to(tl.int64) * L.n_columns + at
        values = tl.load(read, mask=there, other=0.0).to(tl.float32)
        pointers = weight + to[:, None] * L.n_inputs + columns.to(tl.int32)[None, :]
        tl.store(pointers, values.to(weight.dtype.element_ty), mask=there)
