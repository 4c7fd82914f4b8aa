"""What a layer is, and the only definition of what a code means (SPEC 7.5)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from formats.encoding.matrix import MatrixEncoding

F16: TypeAlias = npt.NDArray[np.float16]
F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

# numpy array, numpy scalar or torch tensor: whatever has `-` and `*`.
Values = TypeVar("Values")


class Layer(ABC):
    """A weight [out, in] as the numbers that a section stores; a subclass is a frozen dataclass."""

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """[out, in]"""

    @property
    @abstractmethod
    def encoding(self) -> MatrixEncoding:
        """The encoding that stores it exactly."""

    @abstractmethod
    def dequantize(self) -> F32:
        """The weight that it stands for.  -> [out, in] f32"""

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]


def decode(codes: Values, scale: Values, zero: Values) -> Values:
    """SPEC 7.5: scale * (codes - zero), the only definition of what a code means. Broadcasts; numpy or torch.

    All three are float32 already: u8 would wrap below zero. With an fp16 scale and an integer zero the result is
    exact, not merely close: the scale has 11 significant bits, `codes - zero` is an integer of 9 bits with its sign,
    so the product fits the 24 bits of a float32 and every implementation must return the same bits. Two-level
    statistics (SPEC 7.9) have other zeros: then each of the two operations rounds to nearest, ties to even.
    """
    return scale * (codes - zero)  # type: ignore[operator, no-any-return]


def group_index(in_features: int, group_size: int) -> npt.NDArray[np.int64]:
    """The group of every input.  -> [in] i64"""
    return np.arange(in_features, dtype=np.int64) // group_size
