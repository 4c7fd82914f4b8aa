"""How integers of few bits are cut into planes (SPEC 7.4): the widths, and the words that a row takes."""

from formats.errors import FormatError

MIN_BITS = 2
"""Of a code that stands alone; only parts of codes have fewer."""
MAX_BITS = 8
WORD_BITS = 32
_WIDTHS = tuple(tuple(width for width in (8, 4, 2, 1) if bits & width) for bits in range(MAX_BITS + 1))


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, widest first: the powers of two that add up to `bits` (SPEC 7.4.1)."""
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"bits={bits}: must be 1 to {MAX_BITS} (SPEC 7.4.1)")
    return _WIDTHS[bits]


def row_words(n: int, width: int) -> int:
    """32-bit words that hold one row of `n` fields of `width` bits (SPEC 7.4.2)."""
    return -(-n * width // WORD_BITS)
