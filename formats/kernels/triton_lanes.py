"""Numeral systems of ternary values on a GPU (SPEC 7.16): a program takes a block, each of its 32 lanes a row.

Every lane steps as the others do, so the activations of a step are the same for all; which word of the stream a lane
takes is the number of lanes before it that take one too.
"""

import triton
import triton.language as tl

from formats.encoding.ternary_rans import LANES as _LANES
from formats.encoding.ternary_rans import LOWEST as _LOWEST
from formats.encoding.ternary_rans import N_SYMBOLS as _N_SYMBOLS
from formats.encoding.ternary_rans import SLOTS as _SLOTS
from formats.encoding.ternary_rans import VALUES as _VALUES
from formats.kernels.triton_planes import part

LANES, VALUES, N_SYMBOLS = tl.constexpr(_LANES), tl.constexpr(_VALUES), tl.constexpr(_N_SYMBOLS)
SLOTS, LOWEST = tl.constexpr(_SLOTS), tl.constexpr(_LOWEST)
SYMBOLS = tl.constexpr(256)
AT_A_TIME = tl.constexpr(64)


@triton.jit
def fill_tables(section, slots, symbols, offset, BLOCK: tl.constexpr):
    """slots [2^14] u8, the symbol of each; symbols [256] i32, frequency << 16 | first slot; grid: [2^14 / BLOCK].

    A slot's symbol is the number of those whose slots end before it: counted, as a search waits for each of its steps.
    """
    number = tl.arange(0, SYMBOLS)
    frequencies = tl.load(part(section, offset, tl.uint16) + number, mask=number < N_SYMBOLS, other=0).to(tl.int32)
    ends = tl.cumsum(frequencies, 0)
    if tl.program_id(0) == 0:
        tl.store(symbols + number, (frequencies << 16) | (ends - frequencies))
    for i in range(0, BLOCK, AT_A_TIME):
        slot = tl.program_id(0) * BLOCK + i + tl.arange(0, AT_A_TIME)
        before = (ends[None, :] <= slot[:, None]) & (number < N_SYMBOLS)[None, :]
        tl.store(slots + slot, tl.sum(before.to(tl.int32), axis=1).to(tl.uint8))


@triton.jit
def step(section, slots, symbols, digits, offset, state, at, lanes):
    """(values of a symbol, two bits each; the states after it; where the next words are), of 32 lanes."""
    slot = state & (SLOTS - 1)
    symbol = tl.load(slots + slot).to(tl.int32)
    found = tl.load(symbols + symbol).to(tl.uint32)
    state = (found >> 16) * (state // SLOTS) + slot - (found & 0xFFFF)
    asks = (state < LOWEST) & lanes
    order = asks.to(tl.int32)
    word = tl.load(part(section, offset, tl.uint16) + at + tl.cumsum(order, 0) - order, mask=asks, other=0)
    state = tl.where(asks, (state << 16) | word.to(tl.uint32), state)
    return tl.load(digits + symbol), state, at + tl.sum(order, 0)


@triton.jit
def lane_scales(section, offset, rows, keep):
    """What -1 and 1 of some rows stand for."""
    at = part(section, offset, tl.float16) + 2 * rows.to(tl.int64)
    low, high = tl.load(at, mask=keep, other=0.0), tl.load(at + 1, mask=keep, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit(do_not_specialize=["n_tokens"])  # one compilation for any number
def multiply_lanes(
    x, section, slots, symbols, digits, sums, offsets, n_tokens, n_outputs,
    N_INPUTS: tl.constexpr, SCALED: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sums [S, tokens, out] of x [tokens, in] times the weight's transpose; grid: [out / 32, S, tokens / BLOCK_M]."""
    N_SEGMENTS: tl.constexpr = (N_INPUTS + SEGMENT - 1) // SEGMENT
    segment = tl.program_id(1)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) * LANES + tl.arange(0, LANES)
    lanes, keep = rows < n_outputs, tokens < n_tokens
    at = tl.load(part(section, offsets[2], tl.uint32) + tl.program_id(0) * N_SEGMENTS + segment).to(tl.int64)
    states = part(section, offsets[3], tl.uint32) + rows.to(tl.int64) * N_SEGMENTS + segment
    state = tl.load(states, mask=lanes, other=LOWEST)
    low, high = lane_scales(section, offsets[4], rows, lanes)
    total = tl.zeros((BLOCK_M, LANES), tl.float32)
    for first in range(segment * SEGMENT, min(segment * SEGMENT + SEGMENT, N_INPUTS), VALUES):
        five, state, at = step(section, slots, symbols, digits, offsets[1], state, at, lanes)
        for i in tl.static_range(VALUES):
            value = (five >> (2 * i)) & 3
            weights = tl.where(value == 1, low, tl.where(value == 2, high, 0.0))
            inside = first + i < N_INPUTS
            read = x + tokens.to(tl.int64) * N_INPUTS + first + i
            activations = tl.load(read, mask=keep & inside, other=0.0).to(tl.float32)
            if SCALED:
                scale = tl.load(part(section, offsets[5], tl.float16) + first + i, mask=inside, other=0.0)
                activations *= scale.to(tl.float32)
            total += activations[:, None] * weights[None, :]
    to = sums + (segment * n_tokens + tokens[:, None]).to(tl.int64) * n_outputs + rows[None, :]
    tl.store(to, total.to(sums.dtype.element_ty), mask=keep[:, None] & lanes[None, :])


@triton.jit
def decode_lanes(
    section, slots, symbols, digits, ids, weight, offsets, n_outputs,
    N_INPUTS: tl.constexpr, SCALED: tl.constexpr, SEGMENT: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """All rows of the weight, 32 a program, or those of ids [n] i64, one a program; grid: [out / 32 or n, S]."""
    N_SEGMENTS: tl.constexpr = (N_INPUTS + SEGMENT - 1) // SEGMENT
    segment, lane = tl.program_id(1), tl.arange(0, LANES)
    row = tl.load(ids + tl.program_id(0)).to(tl.int32) if HAS_IDS else tl.program_id(0) * LANES
    rows = row // LANES * LANES + lane
    lanes = rows < n_outputs
    wanted = (rows == row) if HAS_IDS else lanes  # the others are decoded for the words that they take
    to = tl.program_id(0) + lane * 0 if HAS_IDS else rows
    at = tl.load(part(section, offsets[2], tl.uint32) + row // LANES * N_SEGMENTS + segment).to(tl.int64)
    states = part(section, offsets[3], tl.uint32) + rows.to(tl.int64) * N_SEGMENTS + segment
    state = tl.load(states, mask=lanes, other=LOWEST)
    low, high = lane_scales(section, offsets[4], rows, lanes)
    for first in range(segment * SEGMENT, min(segment * SEGMENT + SEGMENT, N_INPUTS), VALUES):
        five, state, at = step(section, slots, symbols, digits, offsets[1], state, at, lanes)
        for i in tl.static_range(VALUES):
            value = (five >> (2 * i)) & 3
            weights = tl.where(value == 1, low, tl.where(value == 2, high, 0.0))
            inside = first + i < N_INPUTS
            if SCALED:
                scale = tl.load(part(section, offsets[5], tl.float16) + first + i, mask=inside, other=0.0)
                weights *= scale.to(tl.float32)
            at_input = weight + to.to(tl.int64) * N_INPUTS + first + i
            tl.store(at_input, weights.to(weight.dtype.element_ty), mask=wanted & inside)
