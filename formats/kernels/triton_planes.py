"""Bit planes and bytes as the kernels read them: 16 bytes to a thread where a tile has as many."""

import triton
import triton.language as tl

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
def spread_words(packed, TIMES: tl.constexpr, JOINED: tl.constexpr):
    """Every word [BLOCK_N, words] so many times, a power of two.  -> [BLOCK_N, words, TIMES], or 1 to be broadcast

    JOINED: all of them stay with the thread that has the word, else they are spread over a warp.
    """
    if JOINED:
        spread = packed
        for half in tl.static_range(5):
            if (1 << half) < TIMES:
                spread = tl.join(spread, spread)
        spread = tl.reshape(spread, (packed.shape[0], packed.shape[1], TIMES))
    else:
        spread = packed[:, :, None]
    return spread


@triton.jit
def in_a_register(numbers, offset):
    """`numbers` as they are, but unknown when it is compiled, as no offset is negative: an operation takes one constant
    at most, and a second would be moved to a register each time."""
    return numbers * (offset >= 0).to(tl.uint32)


@triton.jit
def fields(
    section, offset, rows, keep, first,
    WIDTH: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """BLOCK_K fields of a plane of codes from input `first`, which begins a word.  -> [BLOCK_N, BLOCK_K] u32"""
    packed = words_of(section, offset, rows, keep, first, WIDTH, L, BLOCK_K)
    shifts = WIDTH * tl.arange(0, 32 // WIDTH)
    spread = spread_words(packed, 32 // WIDTH, JOINED) >> shifts[None, None, :]
    return tl.reshape(spread & ((1 << WIDTH) - 1), (rows.shape[0], BLOCK_K))


@triton.jit
def field_floats(
    section, offset, rows, keep, first,
    WIDTH: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """As `fields`, as float32. Where a field ends at most 23 bits high in its word, it stays where it is: under the
    exponent that makes its lowest bit count one.
    """
    packed = words_of(section, offset, rows, keep, first, WIDTH, L, BLOCK_K)
    at = WIDTH * tl.arange(0, 32 // WIDTH)
    down = tl.where(at + WIDTH > 23, 16, 0)
    at -= down
    mask, exponent = ((1 << WIDTH) - 1) << at, in_a_register((150 - at) << 23, offset)
    spread = spread_words(packed, 32 // WIDTH, JOINED)
    spread = (spread >> down[None, None, :]) & mask[None, None, :]
    base = exponent.to(tl.float32, bitcast=True)
    found = (spread | exponent[None, None, :]).to(tl.float32, bitcast=True) - base[None, None, :]
    return tl.reshape(found, (rows.shape[0], BLOCK_K))


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
def code_floats(section, offsets, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr, JOINED: tl.constexpr):
    """BLOCK_K codes of every row from input `first` on, as float32."""
    if L.bits == 8 or L.bits == 4 or L.bits == 2:
        codes = field_floats(section, offsets[0], rows, keep, first, L.bits, L, BLOCK_K, JOINED)
    else:
        codes = small_float(codes_of(section, offsets, rows, keep, first, L, L.bits, 0, BLOCK_K, JOINED))
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
def bytes_of(section, offset, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K signed bytes of every row from input `first`.  -> [BLOCK_N, BLOCK_K] i8"""
    inputs = first + tl.arange(0, BLOCK_K)
    at = rows[:, None].to(tl.int64) * L.n_inputs + inputs[None, :]
    inside = keep[:, None] & (inputs < L.n_inputs)[None, :]
    found = tl.load(part(section, offset, tl.int8) + at, mask=inside, other=0)
    return found
