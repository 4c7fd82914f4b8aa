"""A quantized linear layer as numbers, and the only definition of what a code means (SPEC 7.5)."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from formats.bitpack import U8
from formats.encoding import MAX_BITS, MIN_BITS
from formats.errors import FormatError

# numpy array, numpy scalar or torch tensor: whatever has `-` and `*`.
Values = TypeVar("Values")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedLinear:
    """The logical layer: a weight [out, in] as codes with one (scale, zero) per row and group of inputs.

    codes:  [out, in] u8 < 2**bits
    scales: [out, G] f16, finite; G = ceil(in / group_size), the last group may be short
    zeros:  [out, G] u8 < 2**bits; None when symmetric, which means 2**(bits - 1) everywhere
    input_scales: [in] f16, finite, above 0: what each input is multiplied by first; None means 1 everywhere
    """

    codes: U8
    scales: npt.NDArray[np.float16]
    zeros: U8 | None
    bits: int
    group_size: int
    input_scales: npt.NDArray[np.float16] | None = None

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise FormatError(f"bits={self.bits}: must be {MIN_BITS} to {MAX_BITS} (SPEC 7.3)")
        self._check_shape("codes", self.codes, np.uint8, self.codes.shape)
        if self.codes.ndim != 2 or self.codes.size == 0:
            raise FormatError(f"codes {list(self.codes.shape)}: must be [out, in], not empty (SPEC 7.3)")
        if not 1 <= self.group_size <= self.in_features:
            raise FormatError(f"group_size={self.group_size}: must be 1 to {self.in_features} (SPEC 7.3)")
        groups = (self.out_features, -(-self.in_features // self.group_size))
        self._check_shape("scales", self.scales, np.float16, groups)
        if not np.isfinite(self.scales).all():
            raise FormatError("a scale is NaN or infinite (SPEC 7.6)")
        self._check_range("codes", self.codes)
        if self.zeros is not None:
            self._check_shape("zeros", self.zeros, np.uint8, groups)
            self._check_range("zeros", self.zeros)
        if self.input_scales is not None:
            self._check_shape("input_scales", self.input_scales, np.float16, (self.in_features,))
            if not (np.isfinite(self.input_scales) & (self.input_scales > 0)).all():
                raise FormatError("an input scale is NaN, infinite or not above 0 (SPEC 7.6)")

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def _check_shape(
        self, name: str, array: npt.NDArray[np.generic], dtype: npt.DTypeLike, shape: tuple[int, ...]
    ) -> None:
        if array.dtype != dtype or array.shape != shape:
            want = f"{np.dtype(dtype)}{list(shape)}"
            raise FormatError(f"{name} are {array.dtype}{list(array.shape)}: must be {want} (SPEC 7.3)")

    def _check_range(self, name: str, array: U8) -> None:
        largest = int(array.max())
        if largest >= 1 << self.bits:
            raise FormatError(f"{name} reach {largest}: does not fit {self.bits} bits (SPEC 7.4.1)")


def decode(codes: Values, scale: Values, zero: Values) -> Values:
    """SPEC 7.5: scale * (codes - zero), the only definition of what a code means. Broadcasts; numpy or torch.

    All three are float32 already: u8 would wrap below zero. The result is exact, not merely close: an fp16
    scale has 11 significant bits, `codes - zero` is an integer of 9 bits with its sign, so the product fits
    the 24 bits of a float32 and every implementation must return the same bits.
    """
    return scale * (codes - zero)  # type: ignore[operator, no-any-return]


def group_index(in_features: int, group_size: int) -> npt.NDArray[np.int64]:
    """The group of every input.  -> [in] i64"""
    return np.arange(in_features, dtype=np.int64) // group_size


def dequantize(layer: QuantizedLinear) -> npt.NDArray[np.float32]:
    """The weight that the codes stand for.  -> [out, in] f32"""
    index = group_index(layer.in_features, layer.group_size)
    zeros = np.full_like(layer.scales, 1 << (layer.bits - 1)) if layer.zeros is None else layer.zeros
    scale = layer.scales.astype(np.float32)[:, index]  # [out, in]
    zero = zeros.astype(np.float32)[:, index]  # [out, in]
    weight = decode(layer.codes.astype(np.float32), scale, zero)
    return weight if layer.input_scales is None else weight * layer.input_scales.astype(np.float32)
