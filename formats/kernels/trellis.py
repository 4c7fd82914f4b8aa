"""Walking the trellis with torch on the CPU (SPEC 7.14): any rows, without a loop over those above them.

A row's subset depends on the path bits of at most `memory` rows above it, in the same sequence. They are exclusive
ors of shifted bits, so a stripe is decoded with a few rows more at its head, whatever row it starts at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from formats.encoding.planes import WORD_BITS, plane_widths
from formats.kernels.cpu import Rows, unpack_codes, unpack_plane
from formats.trellis import tap_subsets


def level_index(
    path: Tensor, upper: Sequence[Tensor], bits: int, memory: int, run: int, out_features: int, index: Rows
) -> Tensor:
    """The level of every weight in these rows.  -> [rows of index, in] u8 < 2**(bits + 1)

    path: [in, words] i32, a plane of width 1; upper: the planes of the bits - 1 bits above it, [in, words] i32 each
    """
    if isinstance(index, slice):
        start, stop, step = index.indices(out_features)
        found = _of_stripe(path, upper, bits, memory, run, start, max(start, stop))[:, ::step]
    else:
        found = _of_rows(path, upper, bits, memory, run, index)
    return found.T.contiguous()


def _of_stripe(
    path: Tensor, upper: Sequence[Tensor], bits: int, memory: int, run: int, start: int, stop: int
) -> Tensor:
    """[in, stop - start] u8, out of the whole words that hold these rows and the `memory` rows above them."""
    first = max(0, start - memory) // WORD_BITS * WORD_BITS
    walked = unpack_plane(_words(path, 1, first, stop), 1)  # from row `first` on
    lead = start - first
    if lead < memory:  # there are not so many rows above
        walked, lead = torch.nn.functional.pad(walked, (memory, 0)), lead + memory
    found = _subsets(
        lambda back: walked[:, lead - back : lead - back + stop - start], torch.arange(start, stop) % run, memory
    )
    if upper:
        planes = [_words(plane, width, first, stop) for plane, width in zip(upper, plane_widths(bits - 1), strict=True)]
        found |= unpack_codes(planes, bits - 1, low_bit=2)[:, start - first : stop - first]
    return found


def _words(plane: Tensor, width: int, first: int, stop: int) -> Tensor:
    """The words of a plane that hold the fields from `first`, which begins one, to `stop`."""
    return plane[:, first * width // WORD_BITS : -(-stop * width // WORD_BITS)]


def _of_rows(path: Tensor, upper: Sequence[Tensor], bits: int, memory: int, run: int, rows: Tensor) -> Tensor:
    """[in, n] u8 for any rows [n] i64."""
    found = _subsets(lambda back: _fields(path, 1, (rows - back).clamp(min=0)), rows % run, memory)
    low_bit = 2
    for plane, width in zip(upper, plane_widths(bits - 1) if upper else (), strict=True):
        found |= _fields(plane, width, rows) << low_bit
        low_bit += width
    return found


def _fields(plane: Tensor, width: int, numbers: Tensor) -> Tensor:
    """The fields of these numbers out of every row of a plane.  -> [in, n] u8"""
    per_word = WORD_BITS // width
    shifts = (numbers % per_word * width).int()
    return (plane.index_select(1, numbers // per_word) >> shifts & ((1 << width) - 1)).to(torch.uint8)


def _subsets(path_bits: Callable[[int], Tensor], position: Tensor, memory: int) -> Tensor:
    """[in, n] u8 < 4.

    path_bits(back): [in, n] u8, of the rows so many above; position: [n] i64, of each row in its sequence
    """
    found = torch.zeros(path_bits(0).shape, dtype=torch.uint8)
    for back, added in enumerate(tap_subsets(memory)):
        if added:
            found ^= path_bits(back) * ((position >= back) * added).to(torch.uint8)
    return found
