"""`ternary_rans` (SPEC 7.16): ternary values by asymmetric numeral systems, 32 rows to a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from formats.encoding.base import Arrays, PartShapes, Shape, register
from formats.encoding.ternary import TernaryEncoding, TernaryStream, check_count
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    import numpy.typing as npt

LANES = 32
"""Rows that share a stream of words."""
VALUES = 5
"""In a symbol."""
N_SYMBOLS = 3**VALUES
SLOTS = 1 << 14
"""What the frequencies of the symbols add up to."""
LOWEST = 1 << 16
"""Of a state, which is where every one ends."""
SEGMENT_INPUTS = 2 * VALUES
"""What the inputs of a segment are a multiple of: whole symbols, and whole pairs of values."""


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class TernaryRans(TernaryEncoding):
    """SPEC 7.16: `words` of 16 bits; every row is cut into segments of `segment` inputs, the last may be short."""

    name: ClassVar[str] = "ternary_rans"
    segment: int
    words: int

    def __post_init__(self) -> None:
        if self.segment < SEGMENT_INPUTS or self.segment % SEGMENT_INPUTS:
            wanted = f"a multiple of {SEGMENT_INPUTS}, above 0"
            raise FormatError(f"segment={brief(self.segment)}: must be {wanted} (SPEC 7.16)")

    def stream_bits(self, shape: Shape) -> int:
        return 16 * self.words

    def stream(self, shape: Shape) -> RansStream:
        return RansStream(shape, self.segment, self.words)


class RansStream(TernaryStream):
    """Words [n] u16, block after block, where each begins, a state for each lane, and the frequencies of symbols."""

    def __init__(self, shape: Shape, segment: int, n: int) -> None:
        super().__init__(shape)
        self.n_steps = -(-shape[1] // VALUES)  # symbols of a row
        self.segment_steps = min(segment // VALUES, max(self.n_steps, 1))  # 1: of a shape that SPEC 5.3 refuses
        self.n_segments = -(-self.n_steps // self.segment_steps)
        self.n_blocks = -(-shape[0] // LANES) * self.n_segments
        check_count("words", n, 0, shape[0] * self.n_steps, "7.16")  # a symbol asks for one at most
        self.n = n

    def part_shapes(self) -> PartShapes:
        return [
            ("frequencies", "<u2", (N_SYMBOLS,)),
            ("words", "<u2", (self.n,)),
            ("word_blocks", "<u4", (self.n_blocks + 1,)),
            ("states", "<u4", (self.shape[0], self.n_segments)),
        ]

    def decode(self, arrays: Arrays, rows: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        from formats.kernels.ternary import decode_rans

        return decode_rans(arrays, self.segment_steps, self.shape[1], rows, values)

    def check_values(self, arrays: Arrays) -> None:
        from formats.kernels.ternary import check_offsets, walk_rans

        total = int(arrays["frequencies"].sum(dtype="i8"))
        if total != SLOTS:
            raise FormatError(f"frequencies add up to {total}: must be {SLOTS} (SPEC 7.16.2)")
        least = int(arrays["states"].min())
        if least < LOWEST:
            raise FormatError(f"a state is {least}: must be {LOWEST} or more (SPEC 7.16.3)")
        check_offsets("word_blocks", arrays["word_blocks"], self.n, "7.16.3")
        walk_rans(arrays, self.segment_steps, self.n_steps)

    def check_unused_bits(self, arrays: Arrays) -> None:
        from formats.kernels.ternary import walk_rans

        last = walk_rans(arrays, self.segment_steps, self.n_steps)
        wrong = (last >= 3 ** (self.shape[1] - VALUES * (self.n_steps - 1))).nonzero()[0]
        if len(wrong):
            raise FormatError(f"the last symbol of row {int(wrong[0])}: a value behind the last is not 0 (SPEC 7.16.5)")
