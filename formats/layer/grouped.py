"""What the layers share whose codes have a scale per row and group of inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from formats.encoding.planes import MAX_BITS, MIN_BITS
from formats.errors import FormatError
from formats.layer.base import F16, F32, U8, Layer, group_index
from formats.layer.checks import check_array, check_bits, check_finite, check_input_scales, check_range
from formats.layer.outliers import SparseOutliers
from formats.layer.statistics import Statistic, TwoLevel, statistic_values


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupedLayer(Layer):
    """A weight [out, in]: scale * unit, what a unit is being the subclass's; + outlier; * input scale.

    codes:  [out, in] u8 < 2**bits
    scales: [out, G] f16, finite, or quantized; G = ceil(in / group_size), the last group may be short
    input_scales: [in] f16, finite, above 0: what each input is multiplied by first; None means 1 everywhere
    outliers: what is added to the decoded weight; None means nothing
    """

    bit_range: ClassVar[tuple[int, int]] = (MIN_BITS, MAX_BITS)
    codes: U8
    scales: Statistic
    bits: int
    group_size: int
    input_scales: F16 | None = None
    outliers: SparseOutliers | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, self.bit_range)
        check_array("codes", self.codes, np.uint8, self.codes.shape)
        if self.codes.ndim != 2 or self.codes.size == 0:
            raise FormatError(f"codes {list(self.codes.shape)}: must be [out, in], not empty (SPEC 7.3)")
        if not 1 <= self.group_size <= self.in_features:
            raise FormatError(f"group_size={self.group_size}: must be 1 to {self.in_features} (SPEC 7.3)")
        self._check_scales()
        check_range("codes", self.codes, self.bits)
        if self.input_scales is not None:
            check_array("input_scales", self.input_scales, np.float16, (self.in_features,))
            check_input_scales(self.input_scales)
        if self.outliers is not None:
            self.outliers.check_fits(self.shape)
        self._check_own()

    def _check_scales(self) -> None:
        if isinstance(self.scales, np.ndarray):
            check_array("scales", self.scales, np.float16, self.groups)
            check_finite("a scale", self.scales)
        else:
            self._check_groups("scales", self.scales.shape)

    def _check_groups(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != self.groups:
            raise FormatError(f"{name} are {list(shape)}: must be {list(self.groups)} (SPEC 7.3)")

    @abstractmethod
    def _check_own(self) -> None:
        """Check what the subclass has besides."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def groups(self) -> tuple[int, int]:
        """[out, G]"""
        return self.out_features, -(-self.in_features // self.group_size)

    def _common_fields(self) -> dict[str, Any]:
        """The encoding's fields that both have."""
        two_level = self.scales if isinstance(self.scales, TwoLevel) else None
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "input_scales": self.input_scales is not None,
            "stat_bits": two_level.bits if two_level else 0,
            "stat_rows": two_level.rows if two_level else 0,
            "outliers": len(self.outliers) if self.outliers else 0,
        }

    def _per_weight(self, statistic: Any) -> F32:
        """A statistic [out, G] spread over the inputs.  -> [out, in] f32"""
        return statistic_values(statistic)[:, self.groups_of_inputs()]

    def groups_of_inputs(self) -> npt.NDArray[np.int64]:
        """The group of every input.  -> [in] i64"""
        return group_index(self.in_features, self.group_size)

    def _finished(self, weight: F32) -> F32:
        """What comes after scale * unit (SPEC 7.10, 7.5.1); `weight` may be changed."""
        if self.outliers is not None:
            self.outliers.add_to(weight)
        return weight if self.input_scales is None else weight * self.input_scales.astype(np.float32)
