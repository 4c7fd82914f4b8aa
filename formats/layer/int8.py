"""A linear layer as LLM.int8() stores it (SPEC 7.13; arXiv 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from formats.encoding.int8_rows import Int8Rows
from formats.errors import FormatError
from formats.layer.base import F16, F32, Layer
from formats.layer.checks import check_array, check_finite


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Int8Linear(Layer):
    """A weight [out, in] as signed bytes with one scale a row, but for the inputs that carry outlier features.

    codes:   [out, in] i8, -127 to 127; 0 in the columns of these inputs
    scales:  [out] f32, finite, at most 2**64 in magnitude: absmax * (1 / 127) in float32 makes LLM.int8()'s own weights
    columns: [k] u32, rising: those inputs; None when there are none
    values:  [out, k] f16, finite: their weights; None likewise
    """

    codes: npt.NDArray[np.int8]
    scales: F32
    columns: npt.NDArray[np.uint32] | None = None
    values: F16 | None = None

    def __post_init__(self) -> None:
        check_array("codes", self.codes, np.int8, self.codes.shape, "7.13")
        if self.codes.ndim != 2 or self.codes.size == 0:
            raise FormatError(f"codes {list(self.codes.shape)}: must be [out, in], not empty (SPEC 7.13)")
        check_array("scales", self.scales, np.float32, (self.out_features,), "7.13")
        check_finite("a scale", self.scales)
        if self.columns is not None and self.values is not None:
            check_array("columns", self.columns, np.uint32, (max(1, self.columns.size),), "7.13")
            check_array("values", self.values, np.float16, (self.out_features, len(self.columns)), "7.13")
            check_finite("a value", self.values)
        elif self.columns is not None or self.values is not None:
            raise FormatError("columns and values: must be both given or both None (SPEC 7.13)")
        check_codes_and_columns(self.codes, self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def encoding(self) -> Int8Rows:
        return Int8Rows(columns=0 if self.columns is None else len(self.columns))

    def dequantize(self) -> F32:
        weight = self.codes.astype(np.float32) * self.scales[:, None]
        if self.columns is not None and self.values is not None:
            weight[:, self.columns] = self.values
        return weight


def check_codes_and_columns(codes: npt.NDArray[np.int8], columns: npt.NDArray[np.uint32] | None) -> None:
    """SPEC 7.13.2."""
    if int(codes.min()) == -128:
        raise FormatError("a code is -128: must be -127 to 127 (SPEC 7.13.2)")
    if columns is None:
        return
    if (columns[1:] <= columns[:-1]).any():
        raise FormatError("columns do not rise: must, and none may stand twice (SPEC 7.13.2)")
    if int(columns[-1]) >= codes.shape[1]:
        raise FormatError(f"columns reach {int(columns[-1])}: must be below {codes.shape[1]} inputs (SPEC 7.13.2)")
    if codes[:, columns].any():
        raise FormatError("a code of an input in columns is not 0: its values stand apart (SPEC 7.13.2)")
