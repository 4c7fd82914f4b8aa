"""What all kernels share: the numbers of a section, decoded in registers. Called inside of kernels only.

A kernel gets a section as it lies in the file, by its first byte, and the first byte of each of its parts; all else is
in its `Layout` when it is compiled. `rows` [BLOCK_N] are numbers of outputs, `keep` [BLOCK_N] says which of them exist.
"""

import triton
import triton.language as tl

from formats.kernels.layout import AFFINE as _AFFINE
from formats.kernels.layout import BYTES as _BYTES
from formats.kernels.layout import TABLE as _TABLE
from formats.kernels.layout import TRELLIS as _TRELLIS
from formats.kernels.triton_planes import bytes_of, code_at, code_floats, codes_of, part
from formats.kernels.triton_statistics import groups_from, zeros_of

BYTES = tl.constexpr(_BYTES)
TABLE = tl.constexpr(_TABLE)
TRELLIS = tl.constexpr(_TRELLIS)
AFFINE = tl.constexpr(_AFFINE)


@triton.jit
def look_up(section, tables, offsets, codes, L: tl.constexpr):
    """The level of every code.  -> f32

    Out of shared memory, which gives a warp any of 32 levels at once: loads from global memory would be waited for.
    """
    N_LEVELS: tl.constexpr = 1 << (L.bits + 1 if L.kind == TRELLIS else L.bits)
    numbers = tl.arange(0, N_LEVELS)
    if L.has_levels:
        levels = tl.load(part(section, offsets[L.at_levels], tl.float16) + numbers).to(tl.float32)
    else:
        levels = tl.load(tables + L.at_table + numbers)
    found = tl.gather(levels, tl.reshape(codes, (codes.numel,)).to(tl.int32), 0)
    return tl.reshape(found, codes.shape)


@triton.jit
def subset_words(words, before, L: tl.constexpr, WHICH: tl.constexpr):
    """A bit of the subsets of 32 outputs each: parities of the path over a tap word.

    words: the path bits of these outputs; before: of the 32 above them, zeros where a sequence begins
    """
    found = words * 0
    for back in tl.static_range(L.memory + 1):
        if (L.taps[WHICH] >> back) % 2 == 1:
            if back == 0:
                found ^= words
            else:
                found ^= (words << back) | (before >> (32 - back))
    return found


@triton.jit
def path_words(section, offsets, inputs, keep, words, L: tl.constexpr):
    """(words of the path of these inputs, the words before them)."""
    ROW_WORDS: tl.constexpr = (L.n_fields + 31) // 32
    at = part(section, offsets[0], tl.uint32) + inputs.to(tl.int64) * ROW_WORDS + words
    there = keep & (words < ROW_WORDS)
    path = tl.load(at, mask=there, other=0)
    return path, tl.load(at - 1, mask=there & (words % L.run_words > 0), other=0)


@triton.jit
def trellis_units(
    section, tables, offsets, inputs, keep, first, L: tl.constexpr, BLOCK_N: tl.constexpr, JOINED: tl.constexpr
):
    """The levels of BLOCK_N outputs from `first`, which begins a word of the path.  -> [BLOCK_N, BLOCK_K] f32"""
    words = first // 32 + tl.arange(0, BLOCK_N // 32)
    path, before = path_words(section, offsets, inputs[:, None], keep[:, None], words[None, :], L)
    shifts = tl.arange(0, 32)[None, None, :]
    low = (subset_words(path, before, L, 0)[:, :, None] >> shifts) & 1
    high = (subset_words(path, before, L, 1)[:, :, None] >> shifts) & 1
    codes = tl.reshape(low | (high << 1), (inputs.shape[0], BLOCK_N))
    if L.bits > 1:
        codes |= codes_of(section, offsets, inputs, keep, first, L, L.bits - 1, 1, BLOCK_N, JOINED) << 2
    return tl.trans(look_up(section, tables, offsets, codes, L))


@triton.jit
def trellis_code_at(section, offsets, rows, columns, keep, L: tl.constexpr):
    """The numbers of levels wherever they are."""
    path, before = path_words(section, offsets, columns, keep, rows // 32, L)
    shifts = (rows % 32).to(tl.uint32)
    codes = (subset_words(path, before, L, 0) >> shifts) & 1
    codes |= ((subset_words(path, before, L, 1) >> shifts) & 1) << 1
    if L.bits > 1:
        codes |= code_at(section, offsets, columns.to(tl.int64), rows, keep, L.n_fields, L.bits - 1, 1) << 2
    return codes


@triton.jit
def units_of(section, tables, offsets, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr):
    """What BLOCK_K inputs from `first` have to be scaled by their groups' scales.  -> [BLOCK_N, BLOCK_K] f32"""
    SPANS: tl.constexpr = BLOCK_K // L.span
    if L.kind == BYTES:
        units = bytes_of(section, offsets[0], rows, keep, first, L, BLOCK_K).to(tl.float32)
    elif L.kind == TRELLIS:
        inputs = first + tl.arange(0, BLOCK_K)
        top = tl.multiple_of(tl.min(rows), rows.shape[0])
        units = trellis_units(section, tables, offsets, inputs, inputs < L.n_inputs, top, L, rows.shape[0], JOINED)
    else:
        if L.kind == TABLE:
            codes = codes_of(section, offsets, rows, keep, first, L, L.bits, 0, BLOCK_K, JOINED)
            units = look_up(section, tables, offsets, codes, L)
        elif L.kind == AFFINE:
            units = code_floats(section, offsets, rows, keep, first, L, BLOCK_K, JOINED)
            units -= (1 << (L.bits - 1)) if L.symmetric else 0
        else:
            groups = groups_from(section, offsets, first, L, BLOCK_K)
            zeros = zeros_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
            codes = code_floats(section, offsets, rows, keep, first, L, BLOCK_K, JOINED)
            spans = tl.reshape(codes, (rows.shape[0], SPANS, L.span)) - zeros[:, :, None]
            units = tl.reshape(spans, (rows.shape[0], BLOCK_K))
    return units


@triton.jit
def outlier_range(section, offsets, rows, keep, L: tl.constexpr):
    """(first, last + 1) of the outliers of these rows, each i64."""
    starts = part(section, offsets[L.at_outliers], tl.uint32) + rows
    first = tl.load(starts, mask=keep, other=0).to(tl.int64)
    return first, tl.load(starts + 1, mask=keep, other=0).to(tl.int64)


@triton.jit
def outliers_at(section, offsets, at, keep, L: tl.constexpr):
    """(input, value) of outliers by their numbers."""
    if L.has_wide_columns:
        columns = tl.load(part(section, offsets[L.at_outliers + 1], tl.uint32) + at, mask=keep, other=0).to(tl.int32)
    else:
        columns = tl.load(part(section, offsets[L.at_outliers + 1], tl.uint16) + at, mask=keep, other=0).to(tl.int32)
    values = tl.load(part(section, offsets[L.at_outliers + 2], tl.float16) + at, mask=keep, other=0.0)
    return columns, values.to(tl.float32)
