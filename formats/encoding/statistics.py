"""Scales and zeros that are themselves quantized: in two levels (SPEC 7.9), and twice as in QLoRA (SPEC 7.12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from formats.encoding.base import Arrays
from formats.encoding.component import Composite, Numbers, Plain, Planes, RowComponent

if TYPE_CHECKING:
    from torch import Tensor

    from formats.kernels.cpu import Rows

ABSMAX_BLOCK = 256
"""Scale codes that share an absmax (SPEC 7.12.1)."""


class TwoLevelParts(Composite, RowComponent):
    """Codes [out, G] with an fp16 scale and zero for every `n_rows` rows of a group; `of` is "scale" or "zero"."""

    def __init__(self, of: str, shape: tuple[int, int], bits: int, n_rows: int) -> None:
        self.bits, self.n_rows, self.shape = bits, n_rows, shape
        codes, scales, zeros = self.names = (f"{of}_codes", f"{of}_scales", f"{of}_zeros")
        sets = (-(-shape[0] // n_rows), shape[1])
        members = {
            "codes": Planes(codes, bits, shape, flat=True),
            "scales": Numbers(scales, "<f2", sets, f"a scale of the {of}s"),
            "zeros": Numbers(zeros, "<f2", sets, f"a zero of the {of}s"),
        }
        super().__init__(members)

    def unpack(self, arrays: Arrays) -> Any:
        from formats.layer.statistics import TwoLevel

        return TwoLevel(**super().unpack(arrays), bits=self.bits, rows=self.n_rows)

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """[rows of index, G] f32."""
        from formats.kernels.cpu import row_numbers
        from formats.layer.base import decode

        codes, scales, zeros = (held[name] for name in self.names)
        sets = row_numbers(index, self.shape[0]) // self.n_rows
        return decode(codes[index].float(), scales[sets].float(), zeros[sets].float())


class DoubleQuantParts(Composite, RowComponent):
    """Codes [out, G] of the dynamic map, an absmax for every 256 of them, and a mean for all."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        blocks = -(-shape[0] * shape[1] // ABSMAX_BLOCK)
        members = {
            "codes": Plain("scale_codes", "|u1", shape),
            "absmax": Numbers("scale_absmax", "<f4", (blocks,), "an absmax of the scales"),
            "mean": Numbers("scale_mean", "<f4", (1,), "the mean of the scales"),
        }
        super().__init__(members)

    def unpack(self, arrays: Arrays) -> Any:
        from formats.layer.statistics import DoubleQuant

        return DoubleQuant(**super().unpack(arrays))

    def rows(self, held: Mapping[str, Tensor], index: Rows) -> Tensor:
        """[rows of index, G] f32."""
        import torch

        from formats.kernels.cpu import look_up, row_numbers
        from formats.layer.statistics import dynamic_map

        n_groups = self.shape[1]
        first = row_numbers(index, self.shape[0])[:, None] * n_groups  # of each row's codes among all
        blocks = (first + row_numbers(slice(None), n_groups)) // ABSMAX_BLOCK
        return (
            look_up(torch.tensor(dynamic_map()), held["scale_codes"][index]) * held["scale_absmax"][blocks]
            + held["scale_mean"]
        )
