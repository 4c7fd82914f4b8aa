"""A quantized linear layer whose codes count from a minimum (SPEC 7.17)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from formats.encoding.affine import Affine, check_affine
from formats.errors import FormatError
from formats.layer.base import F16, F32, U8, Layer, group_index
from formats.layer.checks import check_array, check_finite, check_range


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Products:
    """A statistic of every row and group: unit * code, or unit * (code - 2**(bits - 1)) if symmetric.

    codes: [out, G] u8 < 2**bits
    units: [out, S] f16, finite; S = ceil(G / groups), the last may be of fewer groups
    """

    codes: U8
    units: F16
    bits: int
    groups: int
    symmetric: bool

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """FormatError unless these are statistics of so many rows and groups."""
        check_array(f"codes of {name}", self.codes, np.uint8, shape, "7.17")
        check_range(f"codes of {name}", self.codes, self.bits)
        check_array(f"units of {name}", self.units, np.float16, (shape[0], -(-shape[1] // self.groups)), "7.17")
        check_finite(f"a unit of the {name}", self.units)

    def values(self) -> F32:
        """What they stand for.  -> [out, G] f32"""
        codes = self.codes.astype(np.float32) - (1 << (self.bits - 1) if self.symmetric else 0)
        return self.units.astype(np.float32)[:, group_index(codes.shape[1], self.groups)] * codes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AffineLinear(Layer):
    """A weight [out, in]: scale * code + minimum; or, symmetric, scale * (code - 2**(bits - 1)).

    codes:  [out, in] u8 < 2**bits
    scales: [out, G] f16, finite, or Products; G = ceil(in / group_size), the last group may be short
    minima: the same; of Products, what is subtracted; None when symmetric, which only Products are
    """

    codes: U8
    scales: F16 | Products
    minima: F16 | Products | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        check_array("codes", self.codes, np.uint8, self.codes.shape, "7.17")
        if self.codes.ndim != 2 or self.codes.size == 0:
            raise FormatError(f"codes {list(self.codes.shape)}: must be [out, in], not empty (SPEC 7.17)")
        check_affine(self.bits, self.group_size, self.symmetric, *self._levels(self.scales))
        if self.group_size > self.in_features:
            raise FormatError(f"group_size={self.group_size}: must be 1 to {self.in_features} (SPEC 7.17)")
        check_range("codes", self.codes, self.bits)
        for name, statistic in (("scales", self.scales), ("minima", self.minima)):
            if isinstance(statistic, Products):
                statistic.check(name, self.groups)
                if statistic.symmetric != self.symmetric:
                    raise FormatError(f"{name}: must have signs if and only if codes have (SPEC 7.17)")
            elif statistic is not None:
                check_array(name, statistic, np.float16, self.groups, "7.17")
                check_finite(f"a {'scale' if name == 'scales' else 'minimum'}", statistic)
        if self.minima is not None and self._levels(self.scales) != self._levels(self.minima):
            raise FormatError("scales and minima: must be stored alike (SPEC 7.17)")

    @staticmethod
    def _levels(statistic: F16 | Products) -> tuple[int, int]:
        """`stat_bits` and `stat_groups`."""
        return (statistic.bits, statistic.groups) if isinstance(statistic, Products) else (0, 0)

    @property
    def symmetric(self) -> bool:
        return self.minima is None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def groups(self) -> tuple[int, int]:
        """[out, G]"""
        return self.out_features, -(-self.in_features // self.group_size)

    @property
    def encoding(self) -> Affine:
        stat_bits, stat_groups = self._levels(self.scales)
        return Affine(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            stat_bits=stat_bits,
            stat_groups=stat_groups,
        )

    def dequantize(self) -> F32:
        codes = self.codes.astype(np.float32) - (1 << (self.bits - 1) if self.symmetric else 0)
        weight = self._per_weight(self.scales) * codes
        if self.minima is None:
            return weight
        minima = self._per_weight(self.minima)
        return weight + (-minima if isinstance(self.minima, Products) else minima)

    def _per_weight(self, statistic: F16 | Products) -> F32:
        """A statistic [out, G] spread over the inputs.  -> [out, in] f32"""
        values = statistic.values() if isinstance(statistic, Products) else statistic.astype(np.float32)
        return values[:, group_index(self.in_features, self.group_size)]
