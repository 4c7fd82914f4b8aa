"""Decode-multiply for many tokens: a tile of the weight is decoded once and goes through the tensor cores.

Weights are rounded to the activations' dtype, as a plain matrix of that dtype would be; sums are float32.
"""

import triton
import triton.language as tl

from formats.kernels.layout import UNIFORM as _UNIFORM
from formats.kernels.triton_codes import units_of
from formats.kernels.triton_planes import code_floats
from formats.kernels.triton_rows import sparse_products
from formats.kernels.triton_statistics import (
    groups_from,
    input_scales_of,
    scaled,
    scales_from,
    with_minima,
    zeros_of,
)

UNIFORM = tl.constexpr(_UNIFORM)


@triton.jit
def tile_of(section, tables, offsets, rows, keep, first, scales, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K inputs of the weight from `first` on, neither outliers nor input scales counted in: one fused operation
    takes a code to its weight, where the reference rounds the difference to its zero first.  -> [BLOCK_N, BLOCK_K] f32
    """
    if L.kind == UNIFORM:
        codes = code_floats(section, offsets, rows, keep, first, L, BLOCK_K, True)
        groups = groups_from(section, offsets, first, L, BLOCK_K)
        zeros = zeros_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
        spans = tl.reshape(codes, (rows.shape[0], BLOCK_K // L.span, L.span))
        spans = spans * scales[:, :, None] - (zeros * scales)[:, :, None]
        weights = tl.reshape(spans, codes.shape)
    else:
        weights = scaled(units_of(section, tables, offsets, rows, keep, first, L, BLOCK_K, True), scales, L)
        weights = with_minima(weights, section, offsets, rows, keep, first, L)
    return weights


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def multiply_tiles(
    x, section, tables, sums, offsets, n_tokens, n_outputs,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """As `multiply_rows`, products of numbers in DOT; grid: [tokens / BLOCK_M, out / BLOCK_N, SPLITS]."""
    split = tl.program_id(2)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < n_outputs
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Triton copies ahead what is at least four bytes wide. Scales may not be, so they are read one step ahead here.
    scales = scales_from(section, tables, offsets, rows, keep, split * BLOCK_K, L, BLOCK_K)
    for first in range(split * BLOCK_K, L.n_inputs, SPLITS * BLOCK_K):
        inputs = first + tl.arange(0, BLOCK_K)
        inside = inputs < L.n_inputs
        following = scales_from(section, tables, offsets, rows, keep, first + SPLITS * BLOCK_K, L, BLOCK_K)
        at = tokens[:, None].to(tl.int64) * L.n_inputs + inputs[None, :]
        values = tl.load(x + at, mask=(tokens < n_tokens)[:, None] & inside[None, :], other=0.0)
        weights = tile_of(section, tables, offsets, rows, keep, first, scales, L, BLOCK_K)
        if L.has_input_scales:
            weights *= input_scales_of(section, offsets, inputs, inside, L)[None, :]
        weights = tl.trans(weights.to(values.dtype)).to(DOT)
        total = tl.dot(values.to(DOT), weights, total, input_precision="ieee")
        scales = following
    at = (split * n_tokens + tokens[:, None]).to(tl.int64) * n_outputs + rows[None, :]
    tl.store(sums + at, total.to(sums.dtype.element_ty), mask=(tokens < n_tokens)[:, None] & keep[None, :])


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def add_sparse(
    x, section, sums, offsets, n_tokens, n_outputs,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what is stored beside the codes to sums [tokens, out] f32; grid: [tokens / BLOCK_M, out / BLOCK_N]."""
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < n_outputs
    there = (tokens < n_tokens)[:, None] & keep[None, :]
    at = sums + tokens[:, None].to(tl.int64) * n_outputs + rows[None, :]
    found = sparse_products(x, section, offsets, tokens, n_tokens, rows, keep, L)
    tl.store(at, tl.load(at, mask=there, other=0.0) + found, mask=there)
