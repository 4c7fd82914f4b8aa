"""Bytes in the golden files of version 1.2 by hand."""

import independent_reader
import numpy as np
from golden_samples import FOLDER
from test_golden_1_1 import part, weights


def test_spec_7_15_a_row_of_five_values_by_hand():
    """0 -1 1 1 0 and 1 0 0 0 -1, each with a zero behind, are three pairs: one phrase each."""
    entry = next(e for e in header("ternary_dict")["tensors"] if e["name"] == "by hand")
    assert (entry["share_low"], entry["share_high"]) == (61, 61)  # half of all values: 64 of 256 each, one of the usual
    assert part("ternary_dict", "by hand", "codeword_rows") == bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])
    assert part("ternary_dict", "by hand", "scales") == bytes.fromhex("00bc 0038 0040 0080")
    first, second = np.frombuffer(part("ternary_dict", "by hand", "codewords"), "<u2").tolist()
    # Z = 134, L = H = 61. Of three pairs, what is likelier than 3 zeros, one -1 and two 1, or as likely and before
    # it; the second phrase has four zeros, one -1 and one 1.
    assert before(3, 1, 2) + place([0, 1, 2, 2, 0, 0]) == first
    assert before(4, 1, 1) + place([2, 0, 0, 0, 1, 0]) == second
    assert weights("ternary_dict", "by hand").tolist() == [[0, -1, 0.5, 0.5, 0], [0, 0, 0, 0, 2]]


def header(name: str) -> dict:
    return independent_reader.read(FOLDER / f"{name}.qtm").header


def orders(z: int, low: int, high: int) -> int:
    found = 1
    for i in range(z + low + high):
        found *= i + 1
    for n in (z, low, high):
        for i in range(n):
            found //= i + 1
    return found


def before(z: int, low: int, high: int) -> int:
    """The codeword of the first phrase of so many 0, -1 and 1, by the shares 134, 61 and 61: one by one, in floats."""

    def likelihood(*counts: int) -> float:
        return sum(n * np.log2(share / 256) for n, share in zip(counts, (134, 61, 61), strict=True))

    own, found = likelihood(z, low, high), 9
    for p in range(2, 15):
        for n_low in range(2 * p + 1):
            for n_high in range(2 * p - n_low + 1):
                counts = 2 * p - n_low - n_high, n_low, n_high
                as_likely = abs(likelihood(*counts) - own) < 1e-9 and (p, n_low, n_high) < (3, low, high)
                if likelihood(*counts) > own + 1e-9 or as_likely:
                    found += orders(*counts)
    return found


def place(phrase: list[int]) -> int:
    """How many phrases of the same values are less, digit by digit."""
    found = 0
    for i, digit in enumerate(phrase):
        for less in range(digit):
            if less in phrase[i:]:
                rest = phrase[i:].copy()
                rest.remove(less)
                found += orders(*(rest.count(d) for d in range(3)))
    return found


def test_spec_7_16_two_lanes_by_hand():
    """Symbols 0 -1 1 1 0 = 3 + 18 + 54 = 75 and 1 0 0 0 -1 = 2 + 81 = 83, 8192 slots each; a segment is 10 inputs."""
    frequencies = np.frombuffer(part("ternary_rans", "by hand", "frequencies"), "<u2")
    assert frequencies.nonzero()[0].tolist() == [75, 83] and frequencies[[75, 83]].tolist() == [8192, 8192]
    assert part("ternary_rans", "by hand", "words") == b""
    # One step back from 65536: 65536 / 8192 * 16384, and 8192 more for the symbol whose slots begin there.
    states = np.frombuffer(part("ternary_rans", "by hand", "states"), "<u4")
    assert states.tolist() == [131072, 131072 + 8192]
    assert np.array_equal(weights("ternary_rans", "by hand"), weights("ternary_dict", "by hand"))
