"""What all kernels share: the numbers of a section, decoded in registers. Called inside of kernels only.

A kernel gets a section as it lies in the file, by its first byte, and the first byte of each of its parts; all else is
in its `Layout` when it is compiled. `rows` [BLOCK_N] are numbers of outputs, `keep` [BLOCK_N] says which of them exist.
"""

import triton
import triton.language as tl

from formats.encoding.statistics import ABSMAX_BLOCK as _ABSMAX_BLOCK
from formats.kernels.layout import AFFINE as _AFFINE
from formats.kernels.layout import BYTES as _BYTES
from formats.kernels.layout import DOUBLE_QUANT as _DOUBLE_QUANT
from formats.kernels.layout import PLAIN as _PLAIN
from formats.kernels.layout import PRODUCTS as _PRODUCTS
from formats.kernels.layout import TABLE as _TABLE
from formats.kernels.layout import TRELLIS as _TRELLIS
from formats.kernels.layout import TWO_LEVEL as _TWO_LEVEL

BYTES, TABLE, TRELLIS = tl.constexpr(_BYTES), tl.constexpr(_TABLE), tl.constexpr(_TRELLIS)
AFFINE, PRODUCTS = tl.constexpr(_AFFINE), tl.constexpr(_PRODUCTS)
PLAIN, TWO_LEVEL, DOUBLE_QUANT = tl.constexpr(_PLAIN), tl.constexpr(_TWO_LEVEL), tl.constexpr(_DOUBLE_QUANT)
ABSMAX_BLOCK = tl.constexpr(_ABSMAX_BLOCK)
TWO_TO_23 = tl.constexpr(0x4B000000)  # as a float32, whose lowest bits count ones


@triton.jit
def part(section, offset, dtype: tl.constexpr):
    """A part as a pointer to its first number."""
    return (section + offset).to(tl.pointer_type(dtype))


@triton.jit
def small_float(codes):
    """Integers below 2^23 as float32, by two operations that run at full rate where a conversion does not."""
    return (codes.to(tl.uint32) | TWO_TO_23).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def words_of(section, offset, rows, keep, first, WIDTH: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """The words of a plane with the codes of BLOCK_K inputs from `first`, which begins one.  -> [BLOCK_N, words] u32"""
    PER_WORD: tl.constexpr = 32 // WIDTH
    ROW_WORDS: tl.constexpr = (L.n_fields * WIDTH + 31) // 32
    words = first // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
    pointers = part(section, offset, tl.uint32) + rows[:, None].to(tl.int64) * ROW_WORDS + words[None, :]
    if ((BLOCK_K - 1) & L.n_fields) == 0:
        packed = tl.load(pointers, mask=keep[:, None], other=0)
    else:
        packed = tl.load(pointers, mask=keep[:, None] & (words < ROW_WORDS)[None, :], other=0)
    return packed


@triton.jit
def fields(
    section, offset, rows, keep, first,
    WIDTH: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """BLOCK_K fields of a plane of codes from input `first`, which begins a word.  -> [BLOCK_N, BLOCK_K] u32

    JOINED: a word's fields stay with the thread that has the word, else they are spread over a warp.
    """
    packed = words_of(section, offset, rows, keep, first, WIDTH, L, BLOCK_K)
    if JOINED:
        spread = packed
        for half in tl.static_range(5):
            if (16 >> half) >= WIDTH:
                spread = tl.join(spread, spread >> (16 >> half))
    else:
        shifts = WIDTH * tl.arange(0, 32 // WIDTH)
        spread = packed[:, :, None] >> shifts[None, None, :]
    return tl.reshape(spread & ((1 << WIDTH) - 1), (rows.shape[0], BLOCK_K))


@triton.jit
def codes_of(
    section, offsets, rows, keep, first,
    L: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """BLOCK_K codes of BITS bits from number `first`; part FIRST is the first plane.  -> [BLOCK_N, BLOCK_K] u32"""
    N_8: tl.constexpr = BITS // 8
    N_4: tl.constexpr = BITS // 4 % 2
    N_2: tl.constexpr = BITS // 2 % 2
    codes = tl.zeros((rows.shape[0], BLOCK_K), tl.uint32)
    if N_8 == 1:
        codes |= fields(section, offsets[FIRST], rows, keep, first, 8, L, BLOCK_K, JOINED)
    if N_4 == 1:
        codes |= fields(section, offsets[FIRST + N_8], rows, keep, first, 4, L, BLOCK_K, JOINED)
    if N_2 == 1:
        codes |= fields(section, offsets[FIRST + N_8 + N_4], rows, keep, first, 2, L, BLOCK_K, JOINED) << (4 * N_4)
    if BITS % 2 == 1:
        found = fields(section, offsets[FIRST + N_8 + N_4 + N_2], rows, keep, first, 1, L, BLOCK_K, JOINED)
        codes |= found << (4 * N_4 + 2 * N_2)
    return codes


@triton.jit
def field_at(section, offset, at, keep, WIDTH: tl.constexpr):
    """The fields number `at` of a plane, wherever they are."""
    PER_WORD: tl.constexpr = 32 // WIDTH
    packed = tl.load(part(section, offset, tl.uint32) + at // PER_WORD, mask=keep, other=0)
    return (packed >> (at % PER_WORD * WIDTH).to(tl.uint32)) & ((1 << WIDTH) - 1)


@triton.jit
def code_at(section, offsets, row_starts, at, keep, N: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr):
    """Codes of BITS bits, the first of whose planes is part FIRST.

    row_starts: of each, how many rows lie before it, each of which has N codes; at: its number in its row
    """
    N_8: tl.constexpr = BITS // 8
    N_4: tl.constexpr = BITS // 4 % 2
    N_2: tl.constexpr = BITS // 2 % 2
    codes = (at * 0).to(tl.uint32)
    if N_8 == 1:
        start = row_starts * ((N * 8 + 31) // 32 * 4)
        codes |= field_at(section, offsets[FIRST], start + at, keep, 8)
    if N_4 == 1:
        start = row_starts * ((N * 4 + 31) // 32 * 8)
        codes |= field_at(section, offsets[FIRST + N_8], start + at, keep, 4)
    if N_2 == 1:
        start = row_starts * ((N * 2 + 31) // 32 * 16)
        codes |= field_at(section, offsets[FIRST + N_8 + N_4], start + at, keep, 2) << (4 * N_4)
    if BITS % 2 == 1:
        start = row_starts * ((N + 31) // 32 * 32)
        found = field_at(section, offsets[FIRST + N_8 + N_4 + N_2], start + at, keep, 1)
        codes |= found << (4 * N_4 + 2 * N_2)
    return codes


@triton.jit
def two_level(section, offsets, rows, groups, keep, L: tl.constexpr, AT: tl.constexpr):
    """SPEC 7.9.1: s * (code - z) of every row and group.  -> f32, as rows and groups broadcast"""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    N_PLANES: tl.constexpr = L.stat_bits // 8 + L.stat_bits // 4 % 2 + L.stat_bits // 2 % 2 + L.stat_bits % 2
    at = rows.to(tl.int64) * N_GROUPS + groups  # packed as one row
    codes = small_float(code_at(section, offsets, at * 0, at, keep, 1, L.stat_bits, AT))
    sets = rows.to(tl.int64) // L.stat_rows * N_GROUPS + groups
    scale = tl.load(part(section, offsets[AT + N_PLANES], tl.float16) + sets, mask=keep, other=0.0)
    zero = tl.load(part(section, offsets[AT + N_PLANES + 1], tl.float16) + sets, mask=keep, other=0.0)
    return scale.to(tl.float32) * (codes - zero.to(tl.float32))


@triton.jit
def unit_products(section, offsets, rows, groups, keep, L: tl.constexpr, AT: tl.constexpr):
    """SPEC 7.17: unit * code of every row and group.  -> f32, as rows and groups broadcast"""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    N_UNITS: tl.constexpr = (N_GROUPS + L.stat_groups - 1) // L.stat_groups
    N_PLANES: tl.constexpr = L.stat_bits // 8 + L.stat_bits // 4 % 2 + L.stat_bits // 2 % 2 + L.stat_bits % 2
    at = rows.to(tl.int64) * N_GROUPS + groups  # packed as one row
    codes = small_float(code_at(section, offsets, at * 0, at, keep, 1, L.stat_bits, AT))
    if L.symmetric:
        codes -= 1 << (L.stat_bits - 1)
    units = part(section, offsets[AT + N_PLANES], tl.float16) + rows.to(tl.int64) * N_UNITS + groups // L.stat_groups
    return tl.load(units, mask=keep, other=0.0).to(tl.float32) * codes


@triton.jit
def minima_of(section, offsets, rows, groups, keep, L: tl.constexpr):
    """The minimum of every row and group of an affine encoding, as `scales_of`."""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    keep = keep & (groups < N_GROUPS)
    if L.stat_bits > 0:
        minima = -unit_products(section, offsets, rows, groups, keep, L, L.at_minima)
    else:
        at = rows.to(tl.int64) * N_GROUPS + groups
        minima = tl.load(part(section, offsets[L.at_minima], tl.float16) + at, mask=keep, other=0.0).to(tl.float32)
    return minima


@triton.jit
def scales_of(section, tables, offsets, rows, groups, keep, L: tl.constexpr):
    """The scale of every row and group.  rows, groups and keep broadcast against each other  -> f32"""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    keep = keep & (groups < N_GROUPS)
    at = rows.to(tl.int64) * N_GROUPS + groups
    if L.scales == PLAIN:
        scales = tl.load(part(section, offsets[L.at_scales], tl.float16) + at, mask=keep, other=0.0).to(tl.float32)
    elif L.scales == TWO_LEVEL:
        scales = two_level(section, offsets, rows, groups, keep, L, L.at_scales)
    elif L.scales == PRODUCTS:
        scales = unit_products(section, offsets, rows, groups, keep, L, L.at_scales)
    elif L.scales == DOUBLE_QUANT:
        codes = tl.load(part(section, offsets[L.at_scales], tl.uint8) + at, mask=keep, other=0)
        mapped = tl.load(tables + L.at_map + codes.to(tl.int32))
        absmax = part(section, offsets[L.at_scales + 1], tl.float32) + at // ABSMAX_BLOCK
        mean = tl.load(part(section, offsets[L.at_scales + 2], tl.float32))
        scales = mapped * tl.load(absmax, mask=keep, other=0.0) + mean
    else:
        of_row = part(section, offsets[L.at_scales], tl.float32) + rows
        scales = tl.load(of_row + groups * 0, mask=keep, other=0.0)
    return scales


@triton.jit
def zeros_of(section, offsets, rows, groups, keep, L: tl.constexpr):
    """The zero of every row and group of a uniform encoding, likewise."""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    keep = keep & (groups < N_GROUPS)
    if L.symmetric:
        zeros = tl.zeros(keep.shape, tl.float32) + (1 << (L.bits - 1))
    elif L.stat_bits > 0:
        zeros = two_level(section, offsets, rows, groups, keep, L, L.at_zeros)
    else:
        at = rows.to(tl.int64) * N_GROUPS + groups
        zeros = small_float(code_at(section, offsets, at * 0, at, keep, 1, L.bits, L.at_zeros))
    return zeros


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
def bytes_of(section, offset, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K signed bytes of every row from input `first`.  -> [BLOCK_N, BLOCK_K] i8"""
    inputs = first + tl.arange(0, BLOCK_K)
    at = rows[:, None].to(tl.int64) * L.n_inputs + inputs[None, :]
    inside = keep[:, None] & (inputs < L.n_inputs)[None, :]
    found = tl.load(part(section, offset, tl.int8) + at, mask=inside, other=0)
    return found


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
        codes = codes_of(section, offsets, rows, keep, first, L, L.bits, 0, BLOCK_K, JOINED)
        if L.kind == TABLE:
            units = look_up(section, tables, offsets, codes, L)
        elif L.kind == AFFINE:
            units = small_float(codes) - ((1 << (L.bits - 1)) if L.symmetric else 0)
        else:
            groups = groups_from(section, offsets, first, L, BLOCK_K)
            zeros = zeros_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
            spans = tl.reshape(small_float(codes), (rows.shape[0], SPANS, L.span)) - zeros[:, :, None]
            units = tl.reshape(spans, (rows.shape[0], BLOCK_K))
    return units


@triton.jit
def group_at(section, offsets, inputs, keep, L: tl.constexpr):
    """The groups of inputs; one that there is not where `keep` is False."""
    if L.has_order:
        places = tl.load(part(section, offsets[L.at_order], tl.uint32) + inputs, mask=keep, other=2 * L.n_inputs)
        inputs = places.to(tl.int32)
    return inputs // L.group_size


@triton.jit
def groups_from(section, offsets, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """The group of every span of BLOCK_K inputs from `first` on."""
    inputs = first + L.span * tl.arange(0, BLOCK_K // L.span)
    return group_at(section, offsets, inputs, inputs < L.n_inputs, L)


@triton.jit
def scales_from(section, tables, offsets, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scale of every span of BLOCK_K inputs from `first` on.  -> [BLOCK_N, spans] f32"""
    groups = groups_from(section, offsets, first, L, BLOCK_K)
    return scales_of(section, tables, offsets, rows[:, None], groups[None, :], keep[:, None], L)


@triton.jit
def scaled(units, scales, L: tl.constexpr):
    """units [BLOCK_N, BLOCK_K] times the scales [BLOCK_N, spans] of their groups: the weight, neither outliers nor
    input scales counted in."""
    spans = tl.reshape(units, (scales.shape[0], scales.shape[1], L.span)) * scales[:, :, None]
    return tl.reshape(spans, units.shape)


@triton.jit
def with_minima(weights, section, offsets, rows, keep, first, L: tl.constexpr):
    """`weights` [BLOCK_N, BLOCK_K] from input `first` on, plus the minima of their groups where there are any."""
    if L.has_minima:
        groups = groups_from(section, offsets, first, L, weights.shape[1])
        minima = minima_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
        spans = tl.reshape(weights, (weights.shape[0], weights.shape[1] // L.span, L.span)) + minima[:, :, None]
        weights = tl.reshape(spans, weights.shape)
    return weights


@triton.jit
def input_scales_of(section, offsets, inputs, keep, L: tl.constexpr):
    """The factors of these inputs, if there are any, else ones.  -> f32"""
    if L.has_input_scales:
        scales = tl.load(part(section, offsets[L.at_input_scales], tl.float16) + inputs, mask=keep, other=0.0)
        factors = scales.to(tl.float32)
    else:
        factors = tl.full(inputs.shape, 1.0, tl.float32)
    return factors


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
