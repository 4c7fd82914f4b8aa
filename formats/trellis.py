"""The codes behind `trellis` (SPEC 7.14): which subset of the levels a path through the trellis is in at each row.

Trellis-coded quantization (Marcellin and Fischer, IEEE Trans. Commun. 38, 1990): one bit of a code, the path bit,
drives a shift register; the register, not the code, says which quarter of the levels the other bits choose from. So a
row has twice as many levels as its bits could name, and the best sequence of codes is a shortest path.
"""

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]

# Ungerboeck's codes of rate 1/2 (IEEE Trans. Inf. Theory 28, 1982), in octal as they are printed, by the memory of the
# register: bit j set means that the path bit j rows back counts.
H0 = {2: 0o5, 3: 0o13, 4: 0o23, 5: 0o45, 6: 0o103, 7: 0o235, 8: 0o515, 9: 0o1017}
H1 = {2: 0o2, 3: 0o4, 4: 0o4, 5: 0o10, 6: 0o24, 7: 0o126, 8: 0o362, 9: 0o342}


def tap_subsets(memory: int) -> list[int]:
    """For the path bit of each of the last rows, this one first: what it adds to the subset, bit by bit modulo 2.

    -> memory + 1 numbers below 4
    """
    return [(H1[memory] >> back & 1) | (H0[memory] >> back & 1) << 1 for back in range(memory + 1)]


def _window_subsets(memory: int) -> U8:
    """The subset of every window of path bits, the newest lowest.  -> [2**(memory + 1)] u8 < 4"""
    windows = np.arange(1 << (memory + 1), dtype=np.uint32)
    table = np.zeros(len(windows), np.uint8)
    for back, added in enumerate(tap_subsets(memory)):
        table ^= ((windows >> back) & 1).astype(np.uint8) * np.uint8(added)
    table.setflags(write=False)
    return table


SUBSETS: dict[int, U8] = {memory: _window_subsets(memory) for memory in H0}
"""By memory: the subset (0 to 3) of every window of memory + 1 path bits, the newest in the lowest bit."""


def subsets(path: U8, memory: int, run: int) -> U8:
    """The subset that every code is in; all columns at once, as exclusive ors of the path shifted by each tap.

    path: [out, in] u8, 0 or 1; every `run` rows of a column start anew  ->  [out, in] u8 < 4
    """
    position = np.arange(len(path)) % run  # of each row in its sequence
    found = np.zeros_like(path)
    for back, added in enumerate(tap_subsets(memory)):
        if added and back < len(path):
            counts = (position[back:] >= back).astype(np.uint8)[:, None] * np.uint8(added)
            found[back:] ^= path[: len(path) - back] * counts
    return found
