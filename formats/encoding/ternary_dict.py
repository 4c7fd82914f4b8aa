"""`ternary_dict` (SPEC 7.15): phrases of ternary values in codewords of 16 bits, as in QMoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from formats.encoding.base import Arrays, PartShapes, Shape, register
from formats.encoding.ternary import TernaryEncoding, TernaryStream, check_count
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_PAIRS = 14
"""Of values, in a phrase."""
SHARES = 256
"""What the shares of -1, 0 and +1 add up to."""


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class TernaryDict(TernaryEncoding):
    """SPEC 7.15: `codewords` of them, in a dictionary made by the shares (in 256) of -1 and +1."""

    name: ClassVar[str] = "ternary_dict"
    share_low: int
    share_high: int
    codewords: int

    def __post_init__(self) -> None:
        if self.share_low < 1 or self.share_high < 1 or self.share_low + self.share_high >= SHARES:
            shares = f"share_low={brief(self.share_low)}, share_high={brief(self.share_high)}"
            raise FormatError(f"{shares}: must each be 1 or more, together at most {SHARES - 1} (SPEC 7.15)")

    @property
    def dictionary(self) -> tuple[int, ...]:
        return self.share_low, self.share_high

    def stream_bits(self, shape: Shape) -> int:
        return 16 * self.codewords

    def stream(self, shape: Shape) -> DictStream:
        return DictStream(shape, self.share_low, self.share_high, self.codewords)


class DictStream(TernaryStream):
    """Codewords [n] u16, row after row, and where each row begins."""

    def __init__(self, shape: Shape, share_low: int, share_high: int, n: int) -> None:
        super().__init__(shape)
        row_pairs = -(-shape[1] // 2)
        check_count("codewords", n, shape[0] * -(-row_pairs // MAX_PAIRS), shape[0] * row_pairs, "7.15")
        self.shares, self.n, self.row_pairs = (share_low, share_high), n, row_pairs

    def part_shapes(self) -> PartShapes:
        return [("codewords", "<u2", (self.n,)), ("codeword_rows", "<u4", (self.shape[0] + 1,))]

    def decode(self, arrays: Arrays, rows: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        from formats.kernels.ternary import decode_dict

        return decode_dict(arrays, self.shares, self.shape[1], rows, values)

    def check_values(self, arrays: Arrays) -> None:
        from formats.kernels.ternary import check_offsets, row_pairs

        check_offsets("codeword_rows", arrays["codeword_rows"], self.n, "7.15.4")
        pairs = row_pairs(arrays, self.shares)
        wrong = (pairs != self.row_pairs).nonzero()[0]
        if len(wrong):
            row = int(wrong[0])
            raise FormatError(
                f"codewords of row {row} hold {int(pairs[row])} pairs: must be {self.row_pairs} (SPEC 7.15.4)"
            )

    def check_unused_bits(self, arrays: Arrays) -> None:
        from formats.ternary import last_values

        if self.shape[1] % 2:
            ends = arrays["codewords"][arrays["codeword_rows"][1:].astype("i8") - 1]
            wrong = last_values(*self.shares)[ends].nonzero()[0]
            if len(wrong):
                raise FormatError(f"codewords of row {int(wrong[0])}: a value behind the last is not 0 (SPEC 7.15.5)")
