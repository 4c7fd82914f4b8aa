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
from formats.ggml.k_blocks import K_FORMS, KBlocks
from formats.ggml.types import BLOCK, TYPES
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
    from formats.ggml.fit import fit  # brings in a compiler

    importance = None if hessian is None else hessian.diagonal().numpy()
    blocks = fit(weight.contiguous().numpy(), kind_of(spec, weight.shape[1]), importance)
    blocks = replace(blocks, codes=NO_CODES)  # the solver's come in their place
    if isinstance(blocks, Blocks):
        bases = None if blocks.m is None else _by_group(blocks.m.astype(np.float32))
        return GgmlGrid(blocks, _by_group(blocks.d.astype(np.float32)), bases, blocks.form.offset, blocks.form.bits)
    form = blocks.form
    half, half_stat = (0, 0) if form.has_min else (1 << (form.bits - 1), 1 << (form.stat_bits - 1))
    scales, bases = _products(blocks.d, blocks.scales.astype(np.float32) - half_stat), None
    if blocks.d_min is not None and blocks.minima is not None:
        bases = -_products(blocks.d_min, blocks.minima.astype(np.float32))
    return GgmlGrid(blocks, scales, bases, half, form.bits)


def _products(units: np.ndarray, codes: np.ndarray) -> Tensor:
    """units [rows, S] f16 times codes [rows, G] f32, which is exact.  -> [G, rows] f32"""
    return _by_group(np.repeat(units.astype(np.float32), codes.shape[1] // units.shape[1], axis=1) * codes)


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
    kind = f"Q{spec.bits}_{spec.format[-1].upper()}"
    if in_features % TYPES[kind].weights:
        kind = TYPES[kind].fallback or kind
    if in_features % TYPES[kind].weights:
        raise ConfigError(
            f"--format {spec.format}: rows of {in_features} are no whole blocks of {BLOCK}; leave them by --ignore"
        )
    return kind
