"""Decode-multiply on tensor cores without a float operation for a weight: codes of 2 and 4 bits go there as they are.

A code becomes the mantissa of a 16-bit float, two of them in one word at a time, which then counts 2^bits more than the
code (MARLIN, arXiv 2408.11743, makes its floats so). Products of such floats with activations are exact; what they
count too much, and the zeros, are taken off each group's sum by the sum of its activations, and scales multiply sums
instead of weights. So weights are rounded nowhere; activations are where they have scales of their own.
"""

import triton
import triton.language as tl

from formats.kernels.layout import AFFINE as _AFFINE
from formats.kernels.triton_planes import in_a_register, spread_words, words_of
from formats.kernels.triton_statistics import input_scales_of, minima_of, scales_of, zeros_of

AFFINE = tl.constexpr(_AFFINE)


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def arrange_inputs(
    x, section, arranged, sums, offsets, n_tokens,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """arranged [tokens, N_BLOCKS * BLOCK_K]: the inputs times their scales, in the order of `raised_codes`; sums
    [tokens, N_BLOCKS] f32: of blocks of them.  grid: [tokens / BLOCK_M, N_BLOCKS]
    """
    PER_WORD: tl.constexpr = 32 // L.bits
    N_BLOCKS: tl.constexpr = (L.n_inputs + BLOCK_K - 1) // BLOCK_K
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    places = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inputs = places // PER_WORD * PER_WORD + places % 2 * (PER_WORD // 2) + places % PER_WORD // 2
    keep, inside = tokens < n_tokens, inputs < L.n_inputs
    at = tokens[:, None].to(tl.int64) * L.n_inputs + inputs[None, :]
    values = tl.load(x + at, mask=keep[:, None] & inside[None, :], other=0.0).to(tl.float32)
    values = (values * input_scales_of(section, offsets, inputs, inside, L)[None, :]).to(x.dtype.element_ty)
    to = tokens[:, None].to(tl.int64) * (N_BLOCKS * BLOCK_K) + places[None, :]
    tl.store(arranged + to, values, mask=keep[:, None])
    total = tl.sum(values.to(tl.float32), axis=1)
    tl.store(sums + tokens.to(tl.int64) * N_BLOCKS + tl.program_id(1), total, mask=keep)


@triton.jit
def raised_codes(
    section, offset, rows, keep, first,
    DTYPE: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """2^bits + code of BLOCK_K inputs from `first`, which begins a word; code i of a word's first half lies beside code
    i of its second.  -> [BLOCK_N, BLOCK_K] in DTYPE, float16 or bfloat16
    """
    MANTISSA: tl.constexpr = 10 if DTYPE.is_fp16() else 7
    BIAS: tl.constexpr = 15 if DTYPE.is_fp16() else 127
    PLACE: tl.constexpr = MANTISSA - L.bits
    MASK: tl.constexpr = (((1 << L.bits) - 1) << PLACE) * 0x10001
    EXPONENT: tl.constexpr = ((BIAS + L.bits) << MANTISSA) * 0x10001
    packed = words_of(section, offset, rows, keep, first, L.bits, L, BLOCK_K)
    spread = spread_words(packed, 16 // L.bits, True)
    down = (L.bits * tl.arange(0, 16 // L.bits) - PLACE)[None, None, :]
    spread = (spread >> tl.maximum(down, 0)) << tl.maximum(-down, 0)
    pairs = (spread & MASK) | in_a_register(tl.full((1,), EXPONENT, tl.uint32)[:, None, None], offset)
    low, high = pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)
    return tl.reshape(tl.join(low, high), (rows.shape[0], BLOCK_K)).to(DTYPE, bitcast=True)


@triton.jit
def group_of(
    section, tables, sums, offsets, tokens, kept_tokens, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Of one block of inputs, all of one group: (its scales [BLOCK_N], what [BLOCK_N] is to be added times the sums
    [BLOCK_M] of its activations, those sums)."""
    N_BLOCKS: tl.constexpr = (L.n_inputs + BLOCK_K - 1) // BLOCK_K
    blocks = tokens * 0 + first // BLOCK_K  # there may be none behind the last
    total = tl.load(sums + tokens.to(tl.int64) * N_BLOCKS + blocks, mask=kept_tokens & (blocks < N_BLOCKS), other=0.0)
    group = rows * 0 + first // L.group_size
    scales = scales_of(section, tables, offsets, rows, group, keep, L)
    if L.kind == AFFINE:
        added = scales * (-(1 << L.bits) - ((1 << (L.bits - 1)) if L.symmetric else 0))
        if L.has_minima:
            added += minima_of(section, offsets, rows, group, keep, L)
    else:
        added = -scales * (zeros_of(section, offsets, rows, group, keep, L) + (1 << L.bits))
    return scales, added, total


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def multiply_groups(
    arranged, sums, section, tables, y, offsets, n_tokens, n_outputs,
    L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """y [SPLITS, tokens, out] of what `arrange_inputs` gave; grid: [tokens / BLOCK_M, out / BLOCK_N, SPLITS]."""
    N_BLOCKS: tl.constexpr = (L.n_inputs + BLOCK_K - 1) // BLOCK_K
    DTYPE: tl.constexpr = arranged.dtype.element_ty
    split = tl.program_id(2)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept_tokens, keep = tokens < n_tokens, rows < n_outputs
    at = tokens[:, None].to(tl.int64) * (N_BLOCKS * BLOCK_K) + tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Triton copies ahead what is at least four bytes wide. Scales may not be, so they are read one step ahead here.
    scales, added, inputs = group_of(
        section, tables, sums, offsets, tokens, kept_tokens, rows, keep, split * BLOCK_K, L, BLOCK_K
    )
    for first in range(split * BLOCK_K, N_BLOCKS * BLOCK_K, SPLITS * BLOCK_K):
        following = first + SPLITS * BLOCK_K
        next_scales, next_added, next_inputs = group_of(
            section, tables, sums, offsets, tokens, kept_tokens, rows, keep, following, L, BLOCK_K
        )
        values = tl.load(arranged + at + first, mask=kept_tokens[:, None], other=0.0)
        codes = raised_codes(section, offsets[0], rows, keep, first, DTYPE, L, BLOCK_K)
        part = tl.dot(values.to(DOT), tl.trans(codes.to(DOT)), input_precision="ieee")
        total += part * scales[None, :] + inputs[:, None] * added[None, :]
        scales, added, inputs = next_scales, next_added, next_inputs
    to = (split * n_tokens + tokens[:, None]).to(tl.int64) * n_outputs + rows[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=kept_tokens[:, None] & keep[None, :])
