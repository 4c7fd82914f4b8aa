"""The tables behind `trellis` (SPEC 7.14): what makes them good codes, and the walk bit by bit."""

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.encoding.trellis import MAX_MEMORY, MIN_MEMORY
from formats.trellis import H0, H1, SUBSETS, subsets, tap_subsets

MEMORIES = range(MIN_MEMORY, MAX_MEMORY + 1)


def test_there_is_a_code_for_every_memory():
    assert set(H0) == set(H1) == set(SUBSETS) == set(MEMORIES)


@pytest.mark.parametrize("memory", MEMORIES)
def test_branches_of_a_state_are_two_subsets_apart(memory):
    """Ungerboeck's rule: those that leave a state, and those that enter one, share 0 and 2 or 1 and 3."""
    table = SUBSETS[memory]
    assert table.shape == (2 << memory,) and table.dtype == np.uint8
    assert (np.bincount(table) == len(table) // 4).all()  # all subsets as often
    assert (table[0::2] ^ table[1::2] == 2).all()  # windows that differ in the newest bit
    assert (table[: 1 << memory] ^ table[1 << memory :] == 2).all()  # and in the oldest


def free_distance(memory: int) -> int:
    """The least sum of squared distances between two walks that part and meet again, levels a unit apart.

    Subsets d apart, modulo 4, have levels at least min(d, 4 - d) apart, and that depends on their exclusive or alone.
    So one walk may be all zeros.
    """
    squared, table, best = (0, 1, 4, 1), SUBSETS[memory], set()
    queue = [(squared[table[1]], 1)]
    while True:
        distance, state = heapq.heappop(queue)
        if state == 0:
            return distance
        if state not in best:
            best.add(state)
            for window in (2 * state, 2 * state + 1):
                heapq.heappush(queue, (distance + squared[table[window]], window % (1 << memory)))


def test_free_distances_are_those_of_the_best_codes():
    """9, 10, 11, 13, 14, 16 are Ungerboeck's for 4 to 128 states; a wrong tap makes one smaller."""
    assert [free_distance(memory) for memory in MEMORIES] == [9, 10, 11, 13, 14, 16, 17, 18]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MEMORIES), st.integers(1, 150), st.sampled_from([32, 64]), st.integers(0, 2**32 - 1))
def test_spec_7_14_1_subsets_are_those_of_the_windows(memory, rows, run, seed):
    """Against a register that is shifted row by row."""
    path = np.random.default_rng(seed).integers(0, 2, (rows, 3)).astype(np.uint8)
    want = np.empty_like(path)
    for column in range(3):
        window = 0
        for row in range(rows):
            window = 0 if row % run == 0 else window
            window = (window << 1 | int(path[row, column])) & (2 << memory) - 1
            want[row, column] = SUBSETS[memory][window]
    assert np.array_equal(subsets(path, memory, run), want)


def test_taps_by_hand():
    """Memory 3: H1 = 4 is two rows back, H0 = 13 octal, 1011 in bits, is this row, one and three back."""
    assert tap_subsets(3) == [2, 2, 1, 2]
