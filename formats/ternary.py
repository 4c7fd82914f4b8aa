"""The tables of `ternary_dict` and `ternary_rans` (SPEC 7.15, 7.16), by what is measured of a matrix, as integers.

QMoE (arXiv 2310.16795, section 4) has one dictionary, of 88.5 % zeros. Here two shares make it, in integers alone, so
that every machine makes the same one.
"""

from __future__ import annotations

import functools
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from formats.encoding.ternary_dict import MAX_PAIRS, SHARES
from formats.encoding.ternary_rans import N_SYMBOLS, SLOTS, VALUES

U64 = npt.NDArray[np.uint64]

N_PHRASES = 1 << 16
N_PAIRS = 9
LENGTH_BIT = 56
"""Of a packed phrase: values from bit 0 on, two bits each (0, 1 for -1, 2 for +1); from here, the number of pairs."""


class PhraseClass(NamedTuple):
    """Phrases that are equally likely: of so many pairs, with so many -1 and +1."""

    pairs: int
    lows: int
    highs: int

    @property
    def size(self) -> int:
        return comb(2 * self.pairs, self.lows) * comb(2 * self.pairs - self.lows, self.highs)


def ordered_classes(low: int, high: int) -> list[PhraseClass]:
    """All phrases of two pairs and more, the likeliest first (SPEC 7.15.2); exact: integers of up to 224 bits."""
    powers = [[share**n for n in range(2 * MAX_PAIRS + 1)] for share in (SHARES - low - high, low, high, SHARES)]
    found = []
    for pairs in range(2, MAX_PAIRS + 1):
        for lows in range(2 * pairs + 1):
            # Over SHARES^28, a phrase's probability; what it is short of 28 values is any.
            factor = powers[1][lows] * powers[3][2 * (MAX_PAIRS - pairs)]
            for highs in range(2 * pairs - lows + 1):
                likelihood = factor * powers[0][2 * pairs - lows - highs] * powers[2][highs]
                found.append((-likelihood, pairs, lows, highs))
    return [PhraseClass(*each[1:]) for each in sorted(found)]


@functools.lru_cache(maxsize=64)
def phrases(low: int, high: int) -> U64:
    """The phrase of every codeword, packed (`LENGTH_BIT`), by the shares of -1 and +1 in 256.  -> [65536] u64"""
    first = np.full((MAX_PAIRS + 1, 2 * MAX_PAIRS + 1, 2 * MAX_PAIRS + 1), N_PHRASES)  # codeword of a class
    n_found = N_PAIRS
    for each in ordered_classes(low, high):
        first[each] = n_found
        n_found += each.size
        if n_found >= N_PHRASES:
            break
    table = np.empty(N_PHRASES, np.uint64)
    pair = np.arange(N_PAIRS, dtype=np.uint64)
    values = np.stack([pair // 3, pair % 3])  # of each pair
    lows, highs = ((values == value).sum(0) for value in (1, 2))
    digits = pair_digits = values[0] | values[1] << np.uint64(2)
    table[:N_PAIRS] = digits | np.uint64(1 << LENGTH_BIT)
    n_lows, n_highs = lows, highs
    for pairs in range(2, MAX_PAIRS + 1):
        n_lows, n_highs = (_extended(*counts) for counts in ((n_lows, lows), (n_highs, highs)))
        codewords = first[pairs, n_lows, n_highs]
        likely = np.flatnonzero(codewords < N_PHRASES)  # their beginnings are likelier still, so those are here
        codewords = codewords[likely] + _ranks(codewords[likely])
        likely, codewords = (array[codewords < N_PHRASES] for array in (likely, codewords))
        digits = digits[likely // N_PAIRS] | pair_digits[likely % N_PAIRS] << np.uint64(4 * pairs - 4)
        n_lows, n_highs = n_lows[likely], n_highs[likely]
        table[codewords] = digits | np.uint64(pairs << LENGTH_BIT)
    table.setflags(write=False)  # every caller gets the same one
    return table


@functools.lru_cache(maxsize=16)
def longer_phrases(low: int, high: int) -> npt.NDArray[np.uint16]:
    """For every codeword and pair, the codeword of its phrase and that pair, 0 if there is none.  -> [65536, 9] u16"""
    table = phrases(low, high)
    order = np.argsort(table)
    pairs = (table >> np.uint64(LENGTH_BIT))[N_PAIRS:]
    last_bit = np.uint64(4) * pairs - np.uint64(4)
    last = table[N_PAIRS:] >> last_bit & np.uint64(15)
    begun = table[N_PAIRS:] - (last << last_bit) - np.uint64(1 << LENGTH_BIT)  # without the last pair
    found = np.zeros((N_PHRASES, N_PAIRS), np.uint16)
    found[
        order[np.searchsorted(table[order], begun)], (last & np.uint64(3)) * np.uint64(3) + (last >> np.uint64(2))
    ] = np.arange(N_PAIRS, N_PHRASES)
    found.setflags(write=False)
    return found


def _extended(counts: npt.NDArray[np.int64], added: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Of every phrase with every pair behind it, in the order of their values."""
    return (counts[:, None] + added).reshape(-1)


def _ranks(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many of the same key stand before each."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    found = np.empty_like(keys)
    found[order] = np.arange(len(keys)) - np.searchsorted(sorted_keys, sorted_keys)
    return found


@functools.lru_cache(maxsize=64)
def last_values(low: int, high: int) -> npt.NDArray[np.uint8]:
    """The last value of every codeword's phrase, two bits of it.  -> [65536] u8"""
    table = phrases(low, high)
    found = table >> (np.uint64(4) * (table >> np.uint64(LENGTH_BIT)) - np.uint64(2)) & np.uint64(3)
    return found.astype(np.uint8)


@functools.cache
def symbol_digits() -> npt.NDArray[np.uint32]:
    """The five values of every symbol, two bits each as in a packed phrase.  -> [243] u32"""
    symbols = np.arange(N_SYMBOLS, dtype=np.uint32)
    values = [symbols // np.uint32(3**i) % np.uint32(3) << np.uint32(2 * i) for i in range(VALUES)]
    found: npt.NDArray[np.uint32] = np.bitwise_or.reduce(values)
    found.setflags(write=False)
    return found


@functools.cache
def _sixteenths(frequency: int) -> int:
    """Of the bits of a symbol that has so many of the slots: 16 log2 of the frequency is rounded down."""
    return 16 * (SLOTS.bit_length() - 1) + 1 - (frequency**16).bit_length()


def fitted_frequencies(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint16], int]:
    """Frequencies [243] u16 that add up to 2^14, 1 at least where a symbol occurs; and the bits of all symbols.

    counts: [243] i64, not all zero. In integers, so that the same values give the same bytes everywhere.
    """
    shares, total = counts * SLOTS, int(counts.sum())
    found = np.where(counts > 0, np.maximum(shares // total, 1), 0)
    missing = SLOTS - int(found.sum())
    if missing > 0:  # less than one for each that occurs: to those that were rounded down the most
        found[np.argsort(-(shares % total), kind="stable")[:missing]] += 1
    for _ in range(-missing):  # where many rare symbols were given 1
        found[found.argmax()] -= 1
    sixteenths = sum(n * _sixteenths(f) for n, f in zip(counts.tolist(), found.tolist(), strict=True) if n)
    return found.astype(np.uint16), sixteenths // 16
