"""The block types of llama.cpp as grids for the solver, so that a GGUF file holds what it found as it is.

Scales and minima are fitted to the weights as `qtool export --lossy` fits them; then GPTQ chooses the codes, where
llama.cpp rounds every weight to nearest. Rows that are no whole super-blocks fall back as they do there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from formats.encoding import Affine, MatrixEncoding, Shape, Uniform
from formats.ggml.blocks import FORMS, Blocks
from formats.ggml.k_blocks import KBlocks
from formats.ggml.layers import products_of
from formats.ggml.types import BLOCK, K_FORMS, fallback
from formats.layer import Layer, SparseOutliers
from qtool.errors import ConfigError
from qtool.grid import Grid
from qtool.recipe import QuantSpec

NO_CODES = np.empty((0, 0), np.uint8)


@dataclass(frozen=True, eq=False)
class GgmlGrid(Grid):
    """scale * (code - offset) + base: scales and bases [G, out] f32, as `blocks`, which have no codes, decode."""

    blocks: Blocks | KBlocks
    scales: Tensor
    bases: Tensor | None
    offset: int
    bits: int

    def rows(self, stripe: slice) -> GgmlGrid:
        bases = None if self.bases is None else self.bases[:, stripe]
        return replace(self, scales=self.scales[:, stripe], bases=bases)

    def quantize(self, weight: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scales[group]
        base = 0.0 if self.bases is None else self.bases[group]
        whole = torch.round((weight - base) / scale.where(scale != 0, 1.0))
        whole.clamp_(-self.offset, 2**self.bits - 1 - self.offset)
        return whole + self.offset, scale * whole + base

    def layer(
        self, codes: np.ndarray, group_size: int, input_scales: np.ndarray | None, outliers: SparseOutliers | None
    ) -> Layer:
        from formats.ggml.layers import layer_of

        assert input_scales is None and outliers is None
        return layer_of(replace(self.blocks, codes=codes))


def fit_ggml(weight: Tensor, spec: QuantSpec, hessian: Tensor | None = None) -> GgmlGrid:
    """The grid of weight [out, in] f32; hessian [in, in]: its diagonal says how much each input's error counts."""
    from formats.compiled import use_threads  # brings in a compiler
    from formats.ggml.fit import fit

    use_threads(torch.get_num_threads())
    importance = None if hessian is None else hessian.diagonal().numpy()
    blocks = fit(weight.contiguous().numpy(), kind_of(spec, weight.shape[1]), importance)
    blocks = replace(blocks, codes=NO_CODES)  # the solver's come in their place
    if isinstance(blocks, Blocks):
        bases = None if blocks.m is None else _by_group(blocks.m.astype(np.float32))
        return GgmlGrid(blocks, _by_group(blocks.d.astype(np.float32)), bases, blocks.form.offset, blocks.form.bits)
    scales, minima = products_of(blocks)
    bases = None if minima is None else -_by_group(minima.values())
    return GgmlGrid(blocks, _by_group(scales.values()), bases, blocks.form.offset, blocks.form.bits)


def _by_group(statistic: np.ndarray) -> Tensor:
    """[rows, G] -> [G, rows]"""
    return torch.from_numpy(np.ascontiguousarray(statistic.T))


def planned_ggml(spec: QuantSpec, shape: Shape) -> MatrixEncoding:
    """How a matrix [out, in] will be stored."""
    kind = kind_of(spec, shape[1])
    if kind in K_FORMS:
        k_form = K_FORMS[kind]
        return Affine(
            bits=k_form.bits,
            group_size=k_form.group,
            symmetric=not k_form.has_min,
            stat_bits=k_form.stat_bits,
            stat_groups=k_form.n_groups,
        )
    form = FORMS[kind]
    if form.has_min:
        return Affine(bits=form.bits, group_size=BLOCK, symmetric=False)
    return Uniform(bits=form.bits, group_size=BLOCK, symmetric=True)


def kind_of(spec: QuantSpec, in_features: int) -> str:
    """The type that rows of so many inputs can have."""
    kind = fallback(f"Q{spec.bits}_{spec.format[-1].upper()}", in_features)
    if kind is None:
        raise ConfigError(
            f"--format {spec.format}: rows of {in_features} are no whole blocks of {BLOCK}; leave it dense by --ignore"
        )
    return kind
