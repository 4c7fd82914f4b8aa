"""Decode-multiply for a few tokens: memory decides, so every byte of codes is read once, 16 to a thread.

Each program takes BLOCK_N outputs and, of SPLITS in all, one share of the inputs. Products are summed in float32. The
planes of a code are multiplied one after the other, each times its place value: so no plane has to be brought into
another's order.
"""

import triton
import triton.language as tl

from formats.kernels.layout import UNIFORM as _UNIFORM
from formats.kernels.triton_codes import outlier_range, outliers_at, units_of
from formats.kernels.triton_planes import field_floats, part
from formats.kernels.triton_statistics import groups_from, input_scales_of, minima_of, scales_of, zeros_of

UNIFORM = tl.constexpr(_UNIFORM)
OUTLIERS_AT_A_TIME = tl.constexpr(16)


@triton.jit
def tokens_of(x, section, offsets, tokens, n_tokens, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K inputs of every token, times their scales, by spans.  -> [BLOCK_M, 1, spans, span] f32"""
    inputs = first + tl.arange(0, BLOCK_K)
    inside = inputs < L.n_inputs
    at = tokens[:, None].to(tl.int64) * L.n_inputs + inputs[None, :]
    values = tl.load(x + at, mask=(tokens < n_tokens)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if L.has_input_scales:
        values *= input_scales_of(section, offsets, inputs, inside, L)[None, :]
    return tl.reshape(values, (tokens.shape[0], 1, BLOCK_K // L.span, L.span))


@triton.jit
def products(units, values):
    """Sums of spans.  units: [BLOCK_N, spans, span], values: [BLOCK_M, 1, spans, span] -> [BLOCK_M, BLOCK_N, spans]"""
    return tl.sum(units[None, :, :, :] * values, axis=3)


@triton.jit
def plane_products(
    section, offset, rows, keep, first, values, zeros, WIDTH: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The share of one plane; `zeros` are taken off by the first of them."""
    found = field_floats(section, offset, rows, keep, first, WIDTH, L, BLOCK_K, False)
    spans = tl.reshape(found, (rows.shape[0], BLOCK_K // L.span, L.span))
    return products(spans, values) - zeros[None, :, :] * tl.sum(values, axis=3)


@triton.jit
def uniform_products(section, offsets, rows, keep, first, values, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ (code - zero) x of every span.  -> [BLOCK_M, BLOCK_N, spans] f32"""
    N_8: tl.constexpr = L.bits // 8
    N_4: tl.constexpr = L.bits // 4 % 2
    N_2: tl.constexpr = L.bits // 2 % 2
    groups = groups_from(section, offsets, first, L, BLOCK_K)
    zeros = zeros_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
    none = tl.zeros((rows.shape[0], BLOCK_K // L.span), tl.float32)
    if N_8 == 1:
        total = plane_products(section, offsets[0], rows, keep, first, values, zeros, 8, L, BLOCK_K)
    elif N_4 == 1:
        total = plane_products(section, offsets[0], rows, keep, first, values, zeros, 4, L, BLOCK_K)
        if N_2 == 1:
            total += 16 * plane_products(section, offsets[1], rows, keep, first, values, none, 2, L, BLOCK_K)
        if L.bits % 2 == 1:
            found = plane_products(section, offsets[1 + N_2], rows, keep, first, values, none, 1, L, BLOCK_K)
            total += (16 << (2 * N_2)) * found
    else:
        total = plane_products(section, offsets[0], rows, keep, first, values, zeros, 2, L, BLOCK_K)
        if L.bits % 2 == 1:
            total += 4 * plane_products(section, offsets[1], rows, keep, first, values, none, 1, L, BLOCK_K)
    return total


@triton.jit
def outlier_products(x, section, offsets, tokens, n_tokens, rows, keep, L: tl.constexpr):
    """What the outliers of some outputs add.  -> [BLOCK_M, BLOCK_N] f32"""
    first, stop = outlier_range(section, offsets, rows, keep, L)
    total = tl.zeros((tokens.shape[0], rows.shape[0]), tl.float32)
    for start in range(0, tl.max(stop - first).to(tl.int32), OUTLIERS_AT_A_TIME):
        at = first[:, None] + start + tl.arange(0, OUTLIERS_AT_A_TIME)[None, :]
        there = at < stop[:, None]
        columns, values = outliers_at(section, offsets, at, there, L)
        values *= input_scales_of(section, offsets, columns, there, L)
        read = tokens[:, None, None].to(tl.int64) * L.n_inputs + columns[None, :, :]
        inputs = tl.load(x + read, mask=(tokens < n_tokens)[:, None, None] & there[None, :, :], other=0.0)
        total += tl.sum(inputs.to(tl.float32) * values[None, :, :], axis=2)
    return total


@triton.jit
def column_products(x, section, offsets, tokens, n_tokens, rows, keep, L: tl.constexpr):
    """What the inputs with values of their own (SPEC 7.13) add.  -> [BLOCK_M, BLOCK_N] f32"""
    total = tl.zeros((tokens.shape[0], rows.shape[0]), tl.float32)
    for start in range(0, L.n_columns, OUTLIERS_AT_A_TIME):
        at = start + tl.arange(0, OUTLIERS_AT_A_TIME)
        there = at < L.n_columns
        columns = tl.load(part(section, offsets[L.at_columns], tl.uint32) + at, mask=there, other=0).to(tl.int32)
        read = rows[:, None].to(tl.int64) * L.n_columns + at[None, :]
        values = part(section, offsets[L.at_columns + 1], tl.float16) + read
        values = tl.load(values, mask=keep[:, None] & there[None, :], other=0.0).to(tl.float32)
        read = tokens[:, None].to(tl.int64) * L.n_inputs + columns[None, :]
        inputs = tl.load(x + read, mask=(tokens < n_tokens)[:, None] & there[None, :], other=0.0).to(tl.float32)
        total += tl.sum(inputs[:, None, :] * values[None, :, :], axis=2)
    return total


@triton.jit
def sparse_products(x, section, offsets, tokens, n_tokens, rows, keep, L: tl.constexpr):
    """What is stored beside the codes.  -> [BLOCK_M, BLOCK_N] f32"""
    total = tl.zeros((tokens.shape[0], rows.shape[0]), tl.float32)
    if L.has_outliers:
        total += outlier_products(x, section, offsets, tokens, n_tokens, rows, keep, L)
    if L.n_columns > 0:
        total += column_products(x, section, offsets, tokens, n_tokens, rows, keep, L)
    return total


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def multiply_rows(
    x, section, tables, sums, offsets, n_tokens, n_outputs,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """sums [SPLITS, tokens, out] of x [tokens, in] times the weight's transpose; grid: [out / BLOCK_N, SPLITS]."""
    if BLOCK_M == 1:
        n_tokens = 1  # known when it is compiled: fewer registers
    split, tokens = tl.program_id(1), tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < n_outputs
    total = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // L.span), tl.float32)
    for first in range(split * BLOCK_K, L.n_inputs, SPLITS * BLOCK_K):
        values = tokens_of(x, section, offsets, tokens, n_tokens, first, L, BLOCK_K)
        groups = groups_from(section, offsets, first, L, BLOCK_K)
        scales = scales_of(section, tables, offsets, rows[:, None], groups[None, :], keep[:, None], L)
        if L.kind == UNIFORM:
            found = uniform_products(section, offsets, rows, keep, first, values, L, BLOCK_K)
        else:
            units = units_of(section, tables, offsets, rows, keep, first, L, BLOCK_K, False)
            found = products(tl.reshape(units, (BLOCK_N, BLOCK_K // L.span, L.span)), values)
        total += found * scales[None, :, :]
        if L.has_minima:
            minima = minima_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
            total += tl.sum(values, axis=3) * minima[None, :, :]
    y = tl.sum(total, axis=2)
    if split == 0:
        y += sparse_products(x, section, offsets, tokens, n_tokens, rows, keep, L)
    at = (split * n_tokens + tokens[:, None]).to(tl.int64) * n_outputs + rows[None, :]
    tl.store(sums + at, y.to(sums.dtype.element_ty), mask=(tokens < n_tokens)[:, None] & keep[None, :])


@triton.jit
def add_splits(sums, y, n_sums, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y [tokens * out] in its dtype: the splits' sums [SPLITS, tokens * out], added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, read = at < n_sums, sums + at
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLITS):
        total += tl.load(read, mask=inside, other=0.0)
        read += n_sums
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
