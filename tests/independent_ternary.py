"""SPEC 7.15 and 7.16 for `independent_values`: values -1, 0 and 1, codeword by codeword and symbol by symbol."""

from __future__ import annotations

import functools
from math import comb
from typing import Any

import numpy as np
from independent_encodings import must

D = {0: 0, 1: -1, 2: 1}  # what d of 7.15.2 is of

Arrays = dict[str, list[np.ndarray]]


def decode_ternary(entry: dict[str, Any], arrays: Arrays) -> np.ndarray:
    rows = dict_values(entry, arrays) if entry["encoding"] == "ternary_dict" else rans_values(entry, arrays)
    scales = arrays["scales"][0].astype(np.float32)
    weights = np.zeros(entry["shape"], np.float32)
    for r, row in enumerate(rows):
        for k, value in enumerate(row):
            if value:
                weights[r, k] = scales[r, 0 if value == -1 else 1]
    return weights


def check_pointers(name: str, pointers: np.ndarray, n: int, paragraph: str) -> list[int]:
    found = [int(p) for p in pointers]
    must(found[0] == 0 and found[-1] == n and sorted(found) == found, paragraph, f"{name} are {found}")
    return found


# SPEC 7.15


def dict_values(entry: dict[str, Any], arrays: Arrays) -> list[list[int]]:
    n_in = entry["shape"][1]
    pointers = check_pointers("codeword_rows", arrays["codeword_rows"][0], entry["codewords"], "7.15.4")
    rows = []
    for r in range(entry["shape"][0]):
        codewords = arrays["codewords"][0][pointers[r] : pointers[r + 1]]
        row = [value for c in codewords for value in phrase(int(c), entry["share_low"], entry["share_high"])]
        must(len(row) == n_in + n_in % 2, "7.15.4", f"row {r} has {len(row)} values")
        must(not any(row[n_in:]), "7.15.5", f"row {r} ends with {row[-1]}")
        rows.append(row[:n_in])
    return rows


@functools.lru_cache(maxsize=10000)
def phrase(codeword: int, low: int, high: int) -> list[int]:
    """The phrase of a codeword, out of its place among the phrases that are as likely and as long."""
    if codeword < 9:
        return [D[codeword // 3], D[codeword % 3]]
    before = 9
    for pairs, n_low, n_high in kinds(low, high):
        n = count(2 * pairs - n_low - n_high, n_low, n_high)
        if codeword < before + n:
            return at_place(codeword - before, [2 * pairs - n_low - n_high, n_low, n_high])
        before += n
    raise AssertionError("there are more phrases than codewords")


@functools.cache
def kinds(low: int, high: int) -> list[tuple[int, int, int]]:
    """(pairs, how many -1, how many 1) in the order of 7.15.2."""
    found = []
    for p in range(2, 15):
        for n_low in range(2 * p + 1):
            for n_high in range(2 * p - n_low + 1):
                z = 2 * p - n_low - n_high
                integer = (256 - low - high) ** z * low**n_low * high**n_high * 256 ** (28 - 2 * p)
                found.append((-integer, p, n_low, n_high))
    return [(p, n_low, n_high) for _, p, n_low, n_high in sorted(found)]


def count(*counts: int) -> int:
    """In how many orders so many 0, -1 and 1 can stand."""
    return comb(sum(counts), counts[0]) * comb(counts[1] + counts[2], counts[1])


def at_place(place: int, left: list[int]) -> list[int]:
    """The phrase at a place among those of so many 0, -1 and 1, in the order of their d."""
    found = []
    while sum(left):
        for d in range(3):
            if not left[d]:
                continue
            left[d] -= 1
            if place < count(*left):
                found.append(D[d])
                break
            place -= count(*left)
            left[d] += 1
    return found


# SPEC 7.16


def rans_values(entry: dict[str, Any], arrays: Arrays) -> list[list[int]]:
    (n_out, n_in), segment = entry["shape"], entry["segment"]
    frequencies = [int(f) for f in arrays["frequencies"][0]]
    must(sum(frequencies) == 16384, "7.16.2", f"frequencies add up to {sum(frequencies)}")
    symbol_of_slot = [s for s, f in enumerate(frequencies) for _ in range(f)]
    start = [sum(frequencies[:s]) for s in range(243)]
    pointers = check_pointers("word_blocks", arrays["word_blocks"][0], entry["words"], "7.16.3")
    states = arrays["states"][0]
    must(bool((states >= 65536).all()), "7.16.3", f"states are {states}")
    n_segments = -(-n_in // segment)
    rows: list[list[int]] = [[] for _ in range(n_out)]
    for block in range(len(pointers) - 1):
        lanes = range(block // n_segments * 32, min(block // n_segments * 32 + 32, n_out))
        first = block % n_segments * segment
        x = {r: int(states[r, block % n_segments]) for r in lanes}
        words = [int(w) for w in arrays["words"][0][pointers[block] : pointers[block + 1]]]
        for _ in range(-(-min(segment, n_in - first) // 5)):
            for r in lanes:
                s = symbol_of_slot[x[r] % 16384]
                x[r] = frequencies[s] * (x[r] // 16384) + x[r] % 16384 - start[s]
                if x[r] < 65536:
                    must(bool(words), "7.16.4", f"block {block} has too few words")
                    x[r] = 65536 * x[r] + words.pop(0)
                rows[r] += [D[s // 3**i % 3] for i in range(5)]
        must(not words, "7.16.4", f"block {block} has words left")
        must(set(x.values()) == {65536}, "7.16.4", f"block {block} ends at {x}")
    for r, row in enumerate(rows):
        must(not any(row[n_in:]), "7.16.5", f"row {r} ends with {row[n_in:]}")
    return [row[:n_in] for row in rows]
