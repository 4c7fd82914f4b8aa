"""What the encodings of a matrix [out, in] share: a layer of the model that can be decoded row by row."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from formats.encoding.base import Arrays, Encoding, PartShapes, Shape
from formats.encoding.component import Component, Composite
from formats.errors import FormatError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.base import Layer

INPUT_SCALES = "input_scales"
"""The part, if there is one, whose factors a kernel may apply to the inputs instead (SPEC 7.5.1)."""


class MatrixEncoding(Encoding):
    """An encoding of `Layer`s. A subclass names its components and how their rows make a weight."""

    @abstractmethod
    def components(self, shape: Shape) -> Mapping[str, Component]:
        """The layer's attributes that are stored, in the order of the section; FormatError when they cannot be."""

    @abstractmethod
    def unpack(self, arrays: Arrays, shape: Shape) -> Layer:
        """The layer of a section; its arrays are copies."""

    @abstractmethod
    def rows(self, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        """These rows [n, in] f32 of the weight out of what `hold` gave; input scales are not applied."""

    def part_shapes(self, shape: Shape) -> PartShapes:
        if len(shape) != 2:
            raise FormatError(f"shape {list(shape)}: {self.name} needs two dimensions (SPEC 7.3, 7.11, 7.13 to 7.17)")
        return [part for component in self.components(shape).values() for part in component.part_shapes()]

    def composite(self, shape: Shape) -> Composite:
        """The components as one."""
        return _composite(self, shape)

    def pack(self, layer: Layer) -> dict[str, npt.NDArray[Any]]:
        """The parts of a layer."""
        return self.composite(layer.shape).pack(layer)

    def check_values(self, arrays: Arrays, shape: Shape) -> None:
        self.composite(shape).check_values(arrays)

    def check_unused_bits(self, arrays: Arrays, shape: Shape) -> None:
        self.composite(shape).check_unused_bits(arrays)

    def hold(self, parts: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """What any rows are decoded of, out of a section's parts (`as_tensors`)."""
        return self.composite(shape).hold(parts)

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        from formats.kernels.cpu import as_tensors

        held = self.hold(as_tensors(arrays), shape)
        weight = self.rows(held, slice(None), shape)
        return weight.mul_(held[INPUT_SCALES].float()) if INPUT_SCALES in held else weight


@functools.lru_cache(maxsize=1024)
def _composite(encoding: MatrixEncoding, shape: Shape) -> Composite:
    """Kept, as the parts of `Encoding.parts` are."""
    return Composite(encoding.components(shape))
