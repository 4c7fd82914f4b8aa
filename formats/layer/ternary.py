"""A linear layer of ternary weights (SPEC 7.15, 7.16), as QMoE has them (arXiv 2310.16795)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from formats.encoding.ternary import TernaryEncoding
from formats.encoding.ternary_dict import TernaryDict
from formats.encoding.ternary_rans import TernaryRans
from formats.errors import FormatError
from formats.layer.base import F16, F32, Layer
from formats.layer.checks import check_array, check_finite, check_input_scales

if TYPE_CHECKING:
    from formats.kernels.ternary import Stream

CODINGS = {kind.name: kind for kind in (TernaryDict, TernaryRans)}


class _Streamed(Layer):
    """Keeps what its values are packed to: that they take so many bytes is known only once they are."""

    __slots__ = ("_stream",)
    _stream: Stream


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TernaryLinear(_Streamed):
    """A weight [out, in] of zeros and two values a row.

    codes:  [out, in] i8, -1, 0 or 1
    scales: [out, 2] f16, finite, of any sign: what -1 and what +1 of each row stand for
    input_scales: [in] f16, finite, above 0: what each input is multiplied by first; None means 1 everywhere
    coding: what stores it, "ternary_dict" or "ternary_rans"
    """

    codes: npt.NDArray[np.int8]
    scales: F16
    input_scales: F16 | None = None
    coding: str = TernaryDict.name

    def __post_init__(self) -> None:
        if self.coding not in CODINGS:
            raise FormatError(f"coding={self.coding!r}: must be {' or '.join(CODINGS)} (SPEC 7.15, 7.16)")
        check_array("codes", self.codes, np.int8, self.codes.shape, "7.15")
        if self.codes.ndim != 2 or self.codes.size == 0:
            raise FormatError(f"codes {list(self.codes.shape)}: must be [out, in], not empty (SPEC 7.15)")
        least, most = int(self.codes.min()), int(self.codes.max())
        if least < -1 or most > 1:
            raise FormatError(f"codes go from {least} to {most}: must be -1, 0 or 1 (SPEC 7.15)")
        check_array("scales", self.scales, np.float16, (self.out_features, 2), "7.15")
        check_finite("a scale", self.scales)
        if self.input_scales is not None:
            check_array("input_scales", self.input_scales, np.float16, (self.in_features,), "7.15")
            check_input_scales(self.input_scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def stream(self) -> Stream:
        """What the values are packed to."""
        from formats.kernels.ternary import ENCODERS

        if not hasattr(self, "_stream"):
            object.__setattr__(self, "_stream", ENCODERS[self.coding](self.codes))
        return self._stream

    @property
    def encoding(self) -> TernaryEncoding:
        return CODINGS[self.coding](input_scales=self.input_scales is not None, **self.stream.fields)

    def dequantize(self) -> F32:
        scales = self.scales.astype(np.float32)
        weight = np.where(self.codes < 0, scales[:, :1], np.where(self.codes > 0, scales[:, 1:], np.float32(0)))
        return weight if self.input_scales is None else weight * self.input_scales.astype(np.float32)
