"""Weights that are stored apart (SPEC 7.10)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from formats.encoding.outliers import column_dtype
from formats.errors import FormatError
from formats.layer.base import F16, F32
from formats.layer.checks import check_array, check_finite


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SparseOutliers:
    """Values ADDED to some weights of a matrix [out, in], in rows of a CSR matrix; at least one.

    row_ptr: [out + 1] u32, from 0 to nnz, never falling: row r has the values row_ptr[r] to row_ptr[r + 1] - 1
    columns: [nnz] u16, or u32 with more than 65536 inputs; rising within a row
    values:  [nnz] f16, finite
    """

    row_ptr: npt.NDArray[np.uint32]
    columns: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    values: F16

    def __post_init__(self) -> None:
        if self.row_ptr.ndim != 1 or len(self.row_ptr) < 2 or self.values.size == 0:
            n_rows, n_values = max(0, self.row_ptr.size - 1), self.values.size
            raise FormatError(f"outliers: {n_values} in {n_rows} rows: must be 1 or more, or None (SPEC 7.10)")
        check_array("outlier_rows", self.row_ptr, np.uint32, self.row_ptr.shape, "7.10")
        check_array("outlier_values", self.values, np.float16, (self.values.size,), "7.10")
        check_array("outlier_columns", self.columns, self.columns.dtype, self.values.shape, "7.10")
        check_finite("an outlier", self.values)
        self._check_rows()

    def _check_rows(self) -> None:
        first, last = int(self.row_ptr[0]), int(self.row_ptr[-1])
        if first != 0 or last != len(self.values):
            raise FormatError(
                f"outlier_rows go from {first} to {last}: must be from 0 to {len(self.values)} (SPEC 7.10.1)"
            )
        falling = self.row_ptr[1:] < self.row_ptr[:-1]  # of unsigned numbers a difference would wrap
        if falling.any():
            raise FormatError(f"outlier_rows fall behind row {int(falling.argmax())}: must never fall (SPEC 7.10.1)")
        starts = np.zeros(len(self.columns) + 1, bool)
        starts[self.row_ptr] = True
        wrong = (self.columns[1:] <= self.columns[:-1]) & ~starts[1:-1]
        if wrong.any():
            at = int(wrong.argmax()) + 1
            raise FormatError(f"outlier_columns do not rise at outlier {at}: must within a row (SPEC 7.10.1)")

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """FormatError unless these can be outliers of a matrix [out, in]."""
        out_features, in_features = shape
        check_array("outlier_rows", self.row_ptr, np.uint32, (out_features + 1,), "7.10")
        check_array("outlier_columns", self.columns, column_dtype(in_features), self.values.shape, "7.10")
        last = int(self.columns.max())
        if last >= in_features:
            raise FormatError(f"outlier_columns reach {last}: must be below {in_features} inputs (SPEC 7.10.1)")

    def __len__(self) -> int:
        return len(self.values)

    def add_to(self, weight: F32) -> None:
        """Add them to `weight` [out, in] f32 in place, each sum rounded once."""
        rows = np.repeat(np.arange(len(weight)), self.row_ptr[1:] - self.row_ptr[:-1])
        weight[rows, self.columns] += self.values.astype(np.float32)
