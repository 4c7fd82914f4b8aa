"""Asymmetric numeral systems of ternary values on the CPU (SPEC 7.16): compiled loops, the lanes of a block in turn.

Up to 32 lanes share a stream, each with a state of its own: their steps do not wait for each other. Whatever the bytes
are, nothing is read or written beyond its array: a compiled loop does not check its indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.compiled import compiled
from formats.encoding.ternary_rans import LANES, VALUES
from formats.encoding.ternary_rans import LOWEST as _LOWEST
from formats.encoding.ternary_rans import SLOTS as _SLOTS

Array: TypeAlias = npt.NDArray[Any]
SLOTS, LOWEST = np.uint32(_SLOTS), np.uint32(_LOWEST)
SLOT_BITS, WORD_BITS = _SLOTS.bit_length() - 1, 16
FULL_BITS = np.uint32(32 - SLOT_BITS)  # a state whose upper bits reach the frequency would not fit 32 bits
WRONG_WORDS, WRONG_STATE = 1, 2


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function, nogil=True)


def _symbols_of(codes: Array, symbols: Array, counts: Array) -> None:
    """Five values as one, 0, 1 for -1 and 2 for +1, the first the lowest.

    codes: [out, in] i8; written are symbols [out, ceil(in / 5)] u8 and, from zeros, counts [243] i64
    """
    n_in = codes.shape[1]
    for row in range(len(codes)):
        for step in range(symbols.shape[1]):
            symbol, place = np.int64(0), np.int64(1)
            for i in range(VALUES * step, min(VALUES * step + VALUES, n_in)):
                code = codes[row, i]
                symbol += place * (np.int64(code < 0) + 2 * np.int64(code > 0))
                place *= 3
            symbols[row, step] = symbol
            counts[symbol] += 1


def _encode(
    symbols: Array, segment: int, frequencies: Array, starts: Array, words: Array,
    offsets: Array, states: Array,
) -> int:  # fmt: skip
    """Backwards, block by block. Returns the number of words, which end `words`.

    symbols: [out, steps] u8; segment: steps of a lane; frequencies, starts: [243] u32; written are words [as many as
    symbols] u16, offsets [blocks + 1] u32, which count from the end of words, and states [out, S] u32
    """
    n_out, n_steps = symbols.shape
    n_segments = states.shape[1]
    at, block = len(words), len(offsets) - 1
    state = np.empty(LANES, np.uint32)
    offsets[block] = 0
    for first in range((n_out - 1) // LANES * LANES, -1, -LANES):
        lanes = min(LANES, n_out - first)
        for s in range(n_segments - 1, -1, -1):
            state[:] = LOWEST
            for step in range(min(segment * (s + 1), n_steps) - 1, segment * s - 1, -1):
                for lane in range(lanes - 1, -1, -1):
                    x = state[lane]
                    symbol = symbols[first + lane, step]
                    frequency = frequencies[symbol]
                    if x >> FULL_BITS >= frequency:
                        at -= 1
                        words[at] = x & np.uint32(0xFFFF)
                        x >>= np.uint32(WORD_BITS)
                    quotient = x // frequency
                    state[lane] = (quotient << np.uint32(SLOT_BITS)) + (x - quotient * frequency) + starts[symbol]
            states[first : first + lanes, s] = state[:lanes]
            block -= 1
            offsets[block] = len(words) - at
    return len(words) - at


def _walk(
    words: Array, at: int, states: Array, slots: Array, packed: Array, state: Array,
    symbols: Array,
) -> int:  # fmt: skip
    """The symbols of one block; returns the number of the word behind its last, more than there are if it ran out.

    words: [n] u16, n at least 1; at: the block's first; states: [lanes] u32; slots: [2**14] u8; packed: [243] u32,
    frequency << 16 | start; written are state [32] u32, what the states have become, and symbols [lanes, steps] u8
    """
    lanes, n_steps = symbols.shape
    last = np.uint64(len(words) - 1)
    for lane in range(lanes):
        state[lane] = states[lane]
    position = np.uint64(at)
    for step in range(n_steps):
        for lane in range(lanes):
            x = state[lane]
            slot = x & np.uint32(SLOTS - 1)
            symbol = slots[slot]
            found = packed[symbol]
            x = (found >> np.uint32(16)) * (x >> np.uint32(SLOT_BITS)) + slot - (found & np.uint32(0xFFFF))
            is_low = x < LOWEST
            refilled = x << np.uint32(WORD_BITS) | np.uint32(words[min(position, last)])
            state[lane] = refilled if is_low else x
            position += np.uint64(is_low)
            symbols[lane, step] = symbol
    return int(position)


_walk_compiled = _compiled(_walk)


def _check(
    words: Array, offsets: Array, states: Array, slots: Array, packed: Array, segment: int,
    n_steps: int, symbols: Array, last: Array,
) -> tuple[int, int]:  # fmt: skip
    """(block, what is wrong) of the first that is; (-1, 0) if none is.

    offsets: checked; symbols: [32, segment] u8, scratch; written is last [out] u8, the last symbol of every row
    """
    state = np.empty(LANES, np.uint32)
    n_out, n_segments = states.shape
    block = 0
    for first in range(0, n_out, LANES):
        lanes = min(LANES, n_out - first)
        for s in range(n_segments):
            steps = min(segment, n_steps - segment * s)
            found = symbols[:lanes, :steps]
            end = _walk_compiled(words, offsets[block], states[first : first + lanes, s], slots, packed, state, found)
            if end != offsets[block + 1]:
                return block, WRONG_WORDS
            for lane in range(lanes):
                if state[lane] != LOWEST:
                    return block, WRONG_STATE
                last[first + lane] = found[lane, steps - 1]
            block += 1
    return -1, 0


def _decode(
    words: Array, offsets: Array, states: Array, slots: Array, packed: Array, segment: int,
    n_steps: int, digits: Array, rows: Array, pair_values: Array, symbols: Array, found: Array,
) -> None:  # fmt: skip
    """What the values of some rows stand for, two at a time; a block is walked once for rows that follow each other.

    digits: [243] u32, two bits for each of five values; rows: [m] i64, below out; pair_values: [m, 16] of any type,
    what a pair of values stands for; symbols: [32, S * segment + 1] u8, scratch; written is found [m, ceil(in / 2)] of
    that type
    """
    state = np.empty(LANES, np.uint32)
    n_out, n_segments = states.shape
    n_pairs = found.shape[1]
    symbols[:, n_steps] = 0  # behind the last of an odd number
    current = -1
    for i in range(len(rows)):
        block = rows[i] // LANES
        first = block * LANES
        if block != current:
            current = block
            lanes = min(LANES, n_out - first)
            for s in range(n_segments):
                at = offsets[block * n_segments + s]
                part = symbols[:lanes, segment * s : min(segment * (s + 1), n_steps)]
                _walk_compiled(words, at, states[first : first + lanes, s], slots, packed, state, part)
        table, weights, row = pair_values[i], found[i], symbols[rows[i] - first]
        step, done = 0, 0
        while done + VALUES <= n_pairs:
            ten = digits[row[step]] | digits[row[step + 1]] << np.uint32(10)
            step += 2
            to = np.uint64(done)
            for k in range(VALUES):
                weights[to + np.uint64(k)] = table[(ten >> np.uint32(4 * k)) & np.uint32(15)]
            done += VALUES
        if done < n_pairs:
            ten = digits[row[step]] | digits[row[min(step + 1, n_steps)]] << np.uint32(10)
            for k in range(n_pairs - done):
                weights[done + k] = table[(ten >> np.uint32(4 * k)) & np.uint32(15)]


symbols_of, encode, check, decode = (_compiled(each) for each in (_symbols_of, _encode, _check, _decode))
