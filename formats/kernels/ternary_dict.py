"""Phrases of ternary values, found and spelt out on the CPU (SPEC 7.15): compiled loops, one row after the other.

Whatever the bytes are, nothing is read or written beyond its array: a compiled loop does not check its indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from formats.compiled import compiled
from formats.encoding.ternary_dict import MAX_PAIRS
from formats.ternary import LENGTH_BIT

Array: TypeAlias = npt.NDArray[Any]
HALF = MAX_PAIRS // 2


def _encode(codes: Array, longer: Array, codewords: Array, offsets: Array) -> int:
    """Each row as the longest phrase that fits, and again; no other choice has fewer codewords. Returns how many.

    codes: [out, in] i8; longer: [65536, 9] u16, as `formats.ternary.longer_phrases`; written are codewords [>= pairs of
    all rows] u16 and offsets [out + 1] u32
    """
    n_out, n_in = codes.shape
    n = 0
    for row in range(n_out):
        offsets[row] = n
        phrase: Any = -1
        for i in range(0, n_in, 2):
            code = codes[row, i]
            pair: Any = 3 * np.int64(code < 0) + 6 * np.int64(code > 0)
            if i + 1 < n_in:
                code = codes[row, i + 1]
                pair += np.int64(code < 0) + 2 * np.int64(code > 0)
            if phrase < 0:
                phrase = pair
                continue
            extended = np.int64(longer[phrase, pair])
            if extended == 0:
                codewords[n] = phrase
                n += 1
                extended = pair
            phrase = extended
        codewords[n] = phrase
        n += 1
    offsets[n_out] = n
    return n


def _decode(
    codewords: Array, offsets: Array, phrases: Array, rows: Array, pair_values: Array,
    found: Array,
) -> None:  # fmt: skip
    """What the values of some rows stand for, two at a time; of a stream that ends early, zeros.

    codewords: [n] u16; offsets: [out + 1] u32; phrases: [65536] u64; rows: [m] i64, below out; pair_values: [m, 16] of
    any type, what a pair of values stands for; written is found [m, ceil(in / 2)] of that type
    """
    n_pairs = found.shape[1]
    for i in range(len(rows)):
        table, weights = pair_values[i], found[i]
        at = np.int64(offsets[rows[i]])
        stop: Any = min(np.int64(offsets[rows[i] + 1]), len(codewords))
        done: Any = 0
        # More is written than a phrase has, and the next one writes over it: a loop that knows its end is unrolled.
        while done + MAX_PAIRS <= n_pairs and at < stop:
            phrase = phrases[codewords[np.uint64(at)]]
            at += 1
            to, pairs = np.uint64(done), np.int64(phrase >> np.uint64(LENGTH_BIT))
            for k in range(HALF):
                weights[to + np.uint64(k)] = table[(phrase >> np.uint64(4 * k)) & np.uint64(15)]
            if pairs > HALF:
                for k in range(HALF, MAX_PAIRS):
                    weights[to + np.uint64(k)] = table[(phrase >> np.uint64(4 * k)) & np.uint64(15)]
            done += pairs
        while done < n_pairs and at < stop:
            phrase = phrases[codewords[np.uint64(at)]]
            at += 1
            for k in range(min(np.int64(phrase >> np.uint64(LENGTH_BIT)), n_pairs - done)):
                weights[done] = table[(phrase >> np.uint64(4 * k)) & np.uint64(15)]
                done += 1
        weights[done:] = 0


def _lengths(codewords: Array, offsets: Array, phrases: Array, lengths: Array) -> None:
    """The pairs that the codewords of every row hold together.  offsets are checked; written is lengths [out] i64"""
    for row in range(len(lengths)):
        pairs = np.int64(0)
        for at in range(np.int64(offsets[row]), np.int64(offsets[row + 1])):
            pairs += np.int64(phrases[codewords[at]] >> np.uint64(LENGTH_BIT))
        lengths[row] = pairs


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function, nogil=True)


encode, decode, lengths = (_compiled(each) for each in (_encode, _decode, _lengths))
