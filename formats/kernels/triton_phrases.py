"""Phrases of ternary values on a GPU (SPEC 7.15): a program takes a row, and 32 lanes the values of a codeword.

As QMoE's kernel has it (arXiv 2310.16795, section 4.3). Where a phrase begins is the sum of the lengths before it. The
dictionary lies in global memory: 512 KB, which the second-level cache keeps.
"""

import triton
import triton.language as tl

from formats.kernels.triton_planes import part

PLACES = tl.constexpr(32)  # of values in a packed phrase, the last four of which are its length


@triton.jit
def spelt(section, phrases, offset, at, stop, done, CODEWORDS: tl.constexpr):
    """Some codewords from number `at`.  -> values (0, 1 for -1, 2 for 1), their inputs, which exist; how many in all

    values, inputs, there: [CODEWORDS, PLACES]; done: the input that the first of them is of
    """
    numbers = at + tl.arange(0, CODEWORDS)
    codewords = tl.load(part(section, offset, tl.uint16) + numbers, mask=numbers < stop, other=0).to(tl.int32)
    lower = tl.load(phrases + 2 * codewords, mask=numbers < stop, other=0)
    upper = tl.load(phrases + 2 * codewords + 1, mask=numbers < stop, other=0)
    lengths = 2 * (upper >> 24)
    starts = done + tl.cumsum(lengths, 0) - lengths
    place = tl.arange(0, PLACES)
    words = tl.where((place < 16)[None, :], lower[:, None], upper[:, None])
    values = (words >> (place % 16 * 2)[None, :]) & 3
    return values, starts[:, None] + place[None, :], place[None, :] < lengths[:, None], tl.sum(lengths, 0)


@triton.jit
def row_range(section, offset, row):
    """(first, last + 1) of the codewords of a row, each i64."""
    at = part(section, offset, tl.uint32) + row
    return tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)


@triton.jit
def row_scales(section, offset, row):
    """What -1 and 1 of a row stand for."""
    at = part(section, offset, tl.float16) + 2 * row.to(tl.int64)
    return tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def multiply_phrases(
    x, section, phrases, y, offsets, n_tokens, n_outputs,
    N_INPUTS: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, CODEWORDS: tl.constexpr,
):  # fmt: skip
    """y [tokens, out] of x [tokens, in] times the weight's transpose; grid: [out, tokens / BLOCK_M]."""
    row = tl.program_id(0)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = tokens < n_tokens
    first, stop = row_range(section, offsets[1], row)
    low, high = row_scales(section, offsets[2], row)
    total = tl.zeros((BLOCK_M, PLACES), tl.float32)
    done = 0
    for at in range(first, stop, CODEWORDS):
        values, inputs, there, n_values = spelt(section, phrases, offsets[0], at, stop, done, CODEWORDS)
        done += n_values
        there = there & (values > 0) & (inputs < N_INPUTS)  # zeros need no activation
        weights = tl.where(there, tl.where(values == 1, low, high), 0.0)
        if SCALED:
            scales = tl.load(part(section, offsets[3], tl.float16) + inputs, mask=there, other=0.0)
            weights *= scales.to(tl.float32)
        read = x + tokens[:, None, None].to(tl.int64) * N_INPUTS + inputs[None, :, :]
        activations = tl.load(read, mask=keep[:, None, None] & there[None, :, :], other=0.0).to(tl.float32)
        total += tl.sum(activations * weights[None, :, :], axis=1)
    to = y + tokens.to(tl.int64) * n_outputs + row
    tl.store(to, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=keep)


@triton.jit
def decode_phrases(
    section, phrases, ids, weight, offsets,
    N_INPUTS: tl.constexpr, SCALED: tl.constexpr, HAS_IDS: tl.constexpr, CODEWORDS: tl.constexpr,
):  # fmt: skip
    """All rows of the weight, or those of ids [n] i64: weight [n, in]; grid: [n]."""
    to = tl.program_id(0)
    row = tl.load(ids + to).to(tl.int32) if HAS_IDS else to
    first, stop = row_range(section, offsets[1], row)
    low, high = row_scales(section, offsets[2], row)
    done = 0
    for at in range(first, stop, CODEWORDS):
        values, inputs, there, n_values = spelt(section, phrases, offsets[0], at, stop, done, CODEWORDS)
        done += n_values
        there = there & (inputs < N_INPUTS)
        weights = tl.where(values == 1, low, tl.where(values == 2, high, 0.0))
        if SCALED:
            scales = tl.load(part(section, offsets[3], tl.float16) + inputs, mask=there, other=0.0)
            weights *= scales.to(tl.float32)
        at_input = weight + to.to(tl.int64) * N_INPUTS + inputs
        tl.store(at_input, weights.to(weight.dtype.element_ty), mask=there)
