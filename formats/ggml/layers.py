"""Which layer holds the blocks of a type, number for number: the way back of `exact`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from formats.encoding import MIN_BITS
from formats.ggml.blocks import F16, Blocks
from formats.ggml.exact import AnyBlocks
from formats.ggml.k_blocks import KBlocks
from formats.ggml.levels import LEVELS, LevelBlocks
from formats.ggml.types import BLOCK
from formats.layer import AffineLinear, CodebookLinear, Layer, Products, QuantizedLinear


def layer_of(blocks: AnyBlocks) -> Layer:
    """The layer with the numbers of these blocks; where it can be, one of whole steps, in groups as large as can be."""
    if isinstance(blocks, KBlocks):
        return _of_k(blocks)
    if isinstance(blocks, LevelBlocks):
        (d,), group_size = _merged(blocks.d)
        levels = np.array(LEVELS[blocks.kind], np.float16)
        return CodebookLinear(codes=blocks.codes, levels=levels, scales=d, bits=4, group_size=group_size)
    if blocks.m is not None:
        return _of_minimum(blocks, blocks.m)
    (d,), group_size = _merged(blocks.d)
    bits, half = blocks.form.bits, blocks.form.offset
    while (
        bits > MIN_BITS
        and blocks.codes.min() >= half - (half_of := 1 << (bits - 2))
        and (blocks.codes.max() < half + half_of)
    ):
        bits -= 1
    codes = blocks.codes - np.uint8(half - (1 << (bits - 1)))
    return QuantizedLinear(codes=codes, scales=d, zeros=None, bits=bits, group_size=group_size)


def _of_minimum(blocks: Blocks, m: F16) -> Layer:
    """Of whole steps if every minimum is a code times the step, negative."""
    (d, m), group_size = _merged(blocks.d, m)
    step, minimum = d.astype(np.float32), m.astype(np.float32)
    whole = np.rint(np.divide(-minimum, step, out=np.zeros_like(step), where=step != 0))
    zeros = np.clip(np.nan_to_num(whole), 0, (1 << blocks.form.bits) - 1)
    if (-(step * zeros) == minimum).all():
        return QuantizedLinear(
            codes=blocks.codes, scales=d, zeros=zeros.astype(np.uint8), bits=blocks.form.bits, group_size=group_size
        )
    return AffineLinear(codes=blocks.codes, scales=d, minima=m, bits=blocks.form.bits, group_size=group_size)


def _of_k(blocks: KBlocks) -> AffineLinear:
    scales, minima = products_of(blocks)
    form = blocks.form
    return AffineLinear(codes=blocks.codes, scales=scales, minima=minima, bits=form.bits, group_size=form.group)


def products_of(blocks: KBlocks) -> tuple[Products, Products | None]:
    """Scales, and minima where a type has them."""
    form = blocks.form
    scales = Products(
        codes=blocks.scales, units=blocks.d, bits=form.stat_bits, groups=form.n_groups, symmetric=not form.has_min
    )
    minima = None
    if blocks.minima is not None and blocks.d_min is not None:
        minima = replace(scales, codes=blocks.minima, units=blocks.d_min)
    return scales, minima


def _merged(*statistics: F16) -> tuple[list[F16], int]:
    """Statistics [rows, in / 32] with neighbours that are alike in all rows as one, and the size of such groups."""
    rows, n_blocks = statistics[0].shape
    for merged in range(n_blocks, 0, -1):
        if n_blocks % merged == 0:
            grouped = [each.view(np.uint16).reshape(rows, -1, merged) for each in statistics]
            if all((each == each[..., :1]).all() for each in grouped):
                break
    return [np.ascontiguousarray(each[:, ::merged]) for each in statistics], merged * BLOCK
