"""Ternary weights: each row has a value for -1 and one for +1, and zeros between them (QMoE, arXiv 2310.16795).

Without a search the two values are the row's smallest and largest weight, as in QMoE. Few weights are nearer to those
than to zero, so that most are zeros, which is what makes less than one bit a weight possible. With a search they shrink
to where the error is least: far less of it, but half of the weights are no zeros then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape
from formats.encoding.ternary_dict import TernaryDict
from formats.encoding.ternary_rans import SEGMENT_INPUTS, TernaryRans
from formats.header import TensorEntry
from formats.layer import SparseOutliers, TernaryLinear
from qtool.grid import Grid, fit_ranges, full_range, search_range, weighted_error
from qtool.sizes import bits_per_weight

SHRINK_MIN = 0.2
"""Of a row's range: the best level of normal weights is 1.2 standard deviations, the largest of thousands 4."""
FEW_ZEROS = 0.8
"""Below this share of zeros, no coding of ternary values gets below one bit (entropy 0.92 bits, and rows' own data)."""
CLEARLY = 1.05
"""Where a sample says that a dictionary takes so many times the bytes of the other coding, it is not made."""


@dataclass(frozen=True, eq=False)
class TernaryGrid(Grid):
    """low, 0 and high of every row: [1, out] f32 with fp16 values, low <= 0 <= high. Codes are 0, 1 and 2."""

    low: Tensor
    high: Tensor

    def rows(self, stripe: slice) -> TernaryGrid:
        return TernaryGrid(self.low[:, stripe], self.high[:, stripe])

    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.low[group], self.high[group]
        is_low, is_high = weight < low / 2, weight > high / 2
        codes = 1 + is_high.to(torch.uint8) - is_low.to(torch.uint8)
        return codes, torch.where(is_low, low, torch.where(is_high, high, 0.0))

    def layer(
        self,
        codes: np.ndarray,
        group_size: int,
        input_scales: np.ndarray | None,
        outliers: SparseOutliers | None,
    ) -> TernaryLinear:
        from formats.kernels.ternary import foretold_dict  # brings in a compiler

        assert outliers is None
        scales = torch.cat([self.low, self.high]).T.numpy().astype(np.float16)
        ternary = codes.astype(np.int8) - np.int8(1)
        make = partial(TernaryLinear, codes=ternary, scales=scales, input_scales=input_scales)
        by_rans = make(coding=TernaryRans.name)
        foretold = TernaryDict(input_scales=input_scales is not None, **foretold_dict(ternary))
        if foretold.section_bytes(by_rans.shape) > CLEARLY * _bytes(by_rans):
            return by_rans
        return min(by_rans, make(coding=TernaryDict.name), key=_bytes)


def _bytes(layer: TernaryLinear) -> int:
    return layer.encoding.section_bytes(layer.shape)


def fit_ternary(weight: Tensor, *, input_scales: Tensor | None = None, hessian: Tensor | None = None) -> TernaryGrid:
    """The grid of weight [out, in] f32, its input scales [in] divided out: with a Hessian [in, in], where dᵀ H d of
    each row's rounding error d is least."""

    def fit(rows: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        low, high = full_range(rows, symmetric=False)
        if hessian is None:
            return low, high
        metric = hessian[columns, columns]
        return search_range(
            rows, low, high, lambda w, a, b: weighted_error(w, _rounded(w, a, b), metric), least=SHRINK_MIN
        )

    low, high = fit_ranges(weight, input_scales, weight.shape[1], fit)
    return TernaryGrid(low.half().float(), high.half().float())


def _rounded(weight: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """weight [rows, in] rounded to low, 0 and high [rows]."""
    grid = TernaryGrid(low.half().float()[None], high.half().float()[None])
    return grid.quantize(weight.T, 0)[1].T.contiguous()


def share_of_zeros(layer: TernaryLinear) -> float:
    return float(np.mean(layer.codes == 0))


def planned_ternary(shape: Shape, *, input_scales: bool) -> MatrixEncoding:
    """What is planned with before a layer is solved: as if no value were likelier than another."""
    segment = math.ceil(shape[1] / SEGMENT_INPUTS) * SEGMENT_INPUTS
    words = math.ceil(math.prod(shape) * math.log2(3) / 16)
    return TernaryRans(segment=segment, words=words, input_scales=input_scales)


def bits_warning(layers: Sequence[tuple[TensorEntry, float]], wanted: float) -> str | None:
    """What to tell of ternary layers and their shares of zeros where all together take more than `wanted` bits."""
    bits, zeros = _average(layers) if layers else (0.0, 0.0)
    if bits <= wanted:
        return None
    return (
        f"--bits {wanted:g}: ternary layers take {bits:.3f} bits a weight: {zeros:.1%} of them are zero, and that "
        "alone decides; --ternary-grid minmax leaves the most"
    )


def _average(layers: Sequence[tuple[TensorEntry, float]]) -> tuple[float, float]:
    """(bits a weight, all that is stored counted; share of zeros)"""
    weights = sum(math.prod(entry.shape) for entry, _ in layers)
    bits = bits_per_weight((entry.encoding, entry.shape) for entry, _ in layers)
    return bits, sum(zeros * math.prod(entry.shape) for entry, zeros in layers) / weights


def zeros_warning(layers: Sequence[tuple[TensorEntry, float]]) -> str | None:
    """What to tell of layers and their shares of zeros, where some have too few."""
    few = [(entry, zeros) for entry, zeros in layers if zeros < FEW_ZEROS]
    if not few:
        return None
    bits, share = _average(few)
    return (
        f"{len(few)} of {len(layers)} ternary layers have fewer than {FEW_ZEROS:.0%} zeros ({share:.0%} on average): "
        f"they take {bits:.2f} bits a weight, not less than one; --bits 2 --group-size -1 would take 2.0, and lose less"
    )
