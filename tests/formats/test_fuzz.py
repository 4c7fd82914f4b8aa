"""Neighbours of valid files, most of them with right digests: read as one consistent file, or refused.

`make fuzz` looks for more of them for ten minutes; `benchmarks/fuzz.md` says what it found.
"""

import re
from collections import Counter
from pathlib import Path
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import SEEDS, check, mutated, splice
from formats.errors import FormatError
from formats.reader import QtmFile, verify_file

FILES = [path.read_bytes() for path in sorted(Path(SEEDS).glob("*.qtm"))]


def neighbour(file: bytes, rng: Random) -> bytes:
    return mutated(file, rng, lambda part: splice(part, rng))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(file=st.sampled_from(FILES), rng=st.randoms(use_true_random=False), steps=st.integers(1, 4))
def test_a_changed_file_is_refused_or_consistent(file, rng, steps):
    for _ in range(steps):
        file = neighbour(file, rng)
    check(file)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=400))
def test_any_bytes_are_refused(data):
    assert not check(data)


def test_the_changes_reach_all_of_the_reader():
    """So that a mutation that never gets past the first check would be noticed."""
    rng, refused, read = Random(0), Counter(), 0
    for _ in range(4000):
        file = neighbour(neighbour(rng.choice(FILES), rng), rng)
        try:
            verify_file(QtmFile(file, "x.qtm"))
            read += 1
        except FormatError as error:
            refused[re.search(r".*\(SPEC (\d+(\.\d+)?)", str(error))[1]] += 1  # 7.4 for 7.4.4
    assert read > 100
    everywhere = {"2.2", "2.5", "2.6", "3.1", "3.2", "3.3", "3.5", "4.2", "4.3", "4.4"}
    everywhere |= {"5.1", "5.2", "5.4", "7", "7.3", "7.4", "7.6", "7.9", "7.10", "7.11", "7.13", "7.15", "7.16"}
    assert everywhere <= refused.keys(), everywhere - refused.keys()
