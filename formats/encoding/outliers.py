"""Sparse outliers (SPEC 7.10): values that are added to the decoded weight, in rows of a CSR matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from formats.encoding.base import Arrays, Shape
from formats.encoding.component import Composite, Numbers, Plain
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows

MAX_U16_INPUTS = 1 << 16
"""Inputs up to which the column of an outlier takes 16 bits."""
MAX_OUTLIERS = (1 << 32) - 1


class OutlierParts(Composite):
    """Row pointers [out + 1], and a column and a value for each of `n` outliers."""

    def __init__(self, shape: Shape, n: int) -> None:
        if not 0 <= n <= shape[0] * shape[1]:
            raise FormatError(f"outliers={brief(n)}: must be 0 to {shape[0]}x{shape[1]} (SPEC 7.10)")
        if n > MAX_OUTLIERS:
            raise FormatError(f"outliers={brief(n)}: must be at most {MAX_OUTLIERS} (SPEC 7.10)")
        self.shape = shape
        members = {
            "row_ptr": Plain("outlier_rows", "<u4", (shape[0] + 1,)),
            "columns": Plain("outlier_columns", column_dtype(shape[1]), (n,)),
            "values": Numbers("outlier_values", "<f2", (n,), "an outlier"),
        }
        super().__init__(members)

    def unpack(self, arrays: Arrays) -> Any:
        from formats.layer.outliers import SparseOutliers

        return SparseOutliers(**super().unpack(arrays))

    def check_values(self, arrays: Arrays) -> None:
        from formats.layer.outliers import SparseOutliers

        names = {"row_ptr": "outlier_rows", "columns": "outlier_columns", "values": "outlier_values"}
        SparseOutliers(**{field: arrays[name] for field, name in names.items()}).check_fits(self.shape)

    def add_to(self, weight: Tensor, held: Mapping[str, Tensor], index: Rows) -> None:
        """Add those of the rows that `weight` [rows of index, in] f32 holds, in place."""
        from formats.kernels.cpu import add_outliers

        add_outliers(weight, held["outlier_rows"], held["outlier_columns"], held["outlier_values"], index)


def column_dtype(in_features: int) -> str:
    """The type of `outlier_columns`, as numpy writes it."""
    return "<u2" if in_features <= MAX_U16_INPUTS else "<u4"
