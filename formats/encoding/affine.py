"""`affine` (SPEC 7.17): steps from a minimum, both of any size, as ggml has them; in one or two levels along a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from formats.encoding.base import Arrays, Description, Shape, Version, register
from formats.encoding.component import Component, Composite, Numbers, Planes, RowComponent
from formats.encoding.matrix import MatrixEncoding
from formats.encoding.planes import MAX_BITS, MIN_BITS
from formats.errors import FormatError
from formats.strict_json import brief

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows
    from formats.layer.affine import AffineLinear


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Affine(MatrixEncoding):
    """SPEC 7.17: codes of `bits` bits with a scale, and a minimum unless symmetric, per row and group of inputs.

    With `stat_bits`, scales and minima are integers times a unit, which `stat_groups` groups of a row share.
    """

    name: ClassVar[str] = "affine"
    bits: int
    group_size: int
    symmetric: bool
    stat_bits: int = 0
    stat_groups: int = 0

    def __post_init__(self) -> None:
        check_affine(self.bits, self.group_size, self.symmetric, self.stat_bits, self.stat_groups)

    @property
    def version(self) -> Version:
        return (1, 3)

    def components(self, shape: Shape) -> Mapping[str, Component]:
        if self.group_size > shape[1]:
            raise FormatError(f"group_size={brief(self.group_size)}: more than {shape[1]} inputs (SPEC 7.17)")
        found: dict[str, Component] = {"codes": self._codes(shape), "scales": self._statistic("scale", shape)}
        return found if self.symmetric else found | {"minima": self._statistic("minimum", shape)}

    def _codes(self, shape: Shape) -> Planes:
        return Planes("codes", self.bits, (shape[0], shape[1]))

    def _statistic(self, of: str, shape: Shape) -> RowComponent:
        groups = shape[0], -(-shape[1] // self.group_size)
        if self.stat_bits:
            return ProductParts(of, groups, self.stat_bits, self.stat_groups, self.symmetric)
        return Numbers({"scale": "scales", "minimum": "minima"}[of], "<f2", groups, f"a {of}")

    def unpack(self, arrays: Arrays, shape: Shape) -> AffineLinear:
        from formats.layer.affine import AffineLinear

        attributes = {"minima": None} | self.composite(shape).unpack(arrays)
        return AffineLinear(bits=self.bits, group_size=self.group_size, **attributes)

    def describe(self, shape: Shape) -> Description:
        return Description(self.bits, self.group_size, 0)

    def rows(self, held: Mapping[str, Tensor], index: Rows, shape: Shape) -> Tensor:
        from formats.kernels.cpu import add_groups, scale_groups

        weight = self._codes(shape).rows(held, index)[:, : shape[1]].float()
        if self.symmetric:
            weight -= float(1 << (self.bits - 1))
        scale_groups(weight, self._statistic("scale", shape).rows(held, index), self.group_size)
        if self.symmetric:
            return weight
        minima = self._statistic("minimum", shape).rows(held, index)
        return add_groups(weight, -minima if self.stat_bits else minima, self.group_size)


class ProductParts(Composite, RowComponent):
    """Integers [out, G] times an fp16 unit for every `n_groups` of them in a row; `of` is "scale" or "minimum"."""

    def __init__(self, of: str, shape: tuple[int, int], bits: int, n_groups: int, symmetric: bool) -> None:
        self.bits, self.n_groups, self.shape, self.symmetric = bits, n_groups, shape, symmetric
        codes, units = self.names = (f"{of}_codes", f"{of}_units")
        sets = (shape[0], -(-shape[1] // n_groups))
        super().__init__(
            {
                "codes": Planes(codes, bits, shape, flat=True),
                "units": Numbers(units, "<f2", sets, f"a unit of the {'scales' if of == 'scale' else 'minima'}"),
            }
        )

    def unpack(self, arrays: Arrays) -> Any:
        from formats.layer.affine import Products

        attributes = super().unpack(arrays)
        return Products(**attributes, bits=self.bits, groups=self.n_groups, symmetric=self.symmetric)

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """[rows of index, G] f32."""
        codes, units = (held[name][index] for name in self.names)
        values = codes.float()
        n_shared = min(self.n_groups, values.shape[1])  # what a header says of it has no bound
        if self.symmetric:
            values -= float(1 << (self.bits - 1))
        return values.mul_(units.float().repeat_interleave(n_shared, dim=1)[:, : values.shape[1]])


def check_affine(bits: int, group_size: int, symmetric: bool, stat_bits: int, stat_groups: int) -> None:
    """Refuse fields that no section has."""
    for name, value in (("bits", bits), ("stat_bits", stat_bits or MIN_BITS)):
        if not MIN_BITS <= value <= MAX_BITS:
            raise FormatError(f"{name}={brief(value)}: must be {MIN_BITS} to {MAX_BITS} (SPEC 7.17)")
    if group_size < 1:
        raise FormatError(f"group_size={brief(group_size)}: must be 1 or more (SPEC 7.17)")
    if stat_groups < 1 if stat_bits else stat_groups != 0:
        wanted = "1 or more with stat_bits" if stat_bits else "0 without stat_bits"
        raise FormatError(f"stat_groups={brief(stat_groups)}: must be {wanted} (SPEC 7.17)")
    if symmetric and not stat_bits:
        raise FormatError("symmetric without stat_bits: that is uniform (SPEC 7.17)")
