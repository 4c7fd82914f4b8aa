"""Which block types hold a layer without any loss, found from its numbers rather than from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from formats.ggml.blocks import F16, FORMS, Blocks
from formats.ggml.k_blocks import KBlocks
from formats.ggml.levels import LEVELS, LevelBlocks
from formats.ggml.types import BLOCK, K_FORMS, SUPER_BLOCK
from formats.layer import AffineLinear, CodebookLinear, Int8Linear, Layer, Products, QuantizedLinear

I16 = npt.NDArray[np.int16]
AnyBlocks: TypeAlias = Blocks | KBlocks | LevelBlocks
SMALLEST_FIRST = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", *K_FORMS)
"""As far as several can hold a layer; one of the last holds what was made of it alone."""


class NotWhole(Exception):
    """Why a layer is not whole steps in blocks; for people."""


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """A weight [rows, in] as integers times a step: what every type of 32-weight blocks stores, if they are small.

    integers: [rows, in / 32, 32] i16
    steps: [rows, in / 32] f16
    zeros: [rows, in / 32] i16: the code of weight 0 in the layer, which a type with a minimum keeps if it can
    """

    integers: I16
    steps: F16
    zeros: I16


def steps_of(layer: Layer) -> Steps:
    """The same weight, bit for bit in float32 but for the sign of a zero; NotWhole with the reason where it is none."""
    if layer.in_features % BLOCK:
        raise NotWhole(f"rows of {layer.in_features} are no whole blocks of {BLOCK}")
    if isinstance(layer, QuantizedLinear):
        return _of_uniform(layer)
    if isinstance(layer, Int8Linear):
        return _of_int8(layer)
    raise NotWhole(f"weights are stored as {layer.encoding.name}, not in equal steps")


def _of_uniform(layer: QuantizedLinear) -> Steps:
    if not isinstance(layer.scales, np.ndarray) or not isinstance(layer.zeros, np.ndarray | None):
        raise NotWhole("scales are in two levels")
    if layer.outliers is not None:
        raise NotWhole(f"{len(layer.outliers)} outliers stand beside the codes")
    if layer.input_scales is not None and (layer.input_scales != 1).any():
        raise NotWhole("inputs have scales")
    if layer.input_order is not None:
        raise NotWhole("groups have another order than the inputs")
    if layer.group_size % BLOCK and layer.group_size != layer.in_features:
        raise NotWhole(f"groups of {layer.group_size} are no whole blocks of {BLOCK}")
    group_of_block = np.arange(0, layer.in_features, BLOCK) // layer.group_size
    shape = layer.out_features, len(group_of_block)
    middle = np.full(layer.groups, 1 << (layer.bits - 1), np.int16)
    zeros = (middle if layer.zeros is None else layer.zeros.astype(np.int16))[:, group_of_block]
    integers = layer.codes.astype(np.int16).reshape(*shape, BLOCK) - zeros[..., None]
    return _without_idle(Steps(integers, layer.scales[:, group_of_block], zeros))


def _of_int8(layer: Int8Linear) -> Steps:
    if layer.columns is not None:
        raise NotWhole(f"{len(layer.columns)} inputs are kept in 16 bits")
    steps = layer.scales.astype(np.float16)
    if (steps.astype(np.float32) != layer.scales).any():
        raise NotWhole("scales need more than 16 bits")
    n_blocks = layer.in_features // BLOCK
    integers = layer.codes.astype(np.int16).reshape(layer.out_features, n_blocks, BLOCK)
    spread = np.repeat(steps[:, None], n_blocks, axis=1)
    return _without_idle(Steps(integers, spread, np.full(spread.shape, 128, np.int16)))


def _without_idle(steps: Steps) -> Steps:
    """Integers that are multiplied by 0 as 0, so that they do not ask for more bits."""
    idle = steps.steps == 0
    if idle.any():
        steps.integers[idle] = 0
    return steps


def exact_blocks(steps: Steps, kind: str) -> Blocks | None:
    """The weight as blocks of a type of `FORMS`; None where it does not fit."""
    form = FORMS[kind]
    low, high = steps.integers.min(axis=2), steps.integers.max(axis=2)
    if form.has_min:
        return _with_minimum(steps, kind, low, high)
    most = (1 << (form.bits - 1)) - 1
    upright = (low >= -most - 1) & (high <= most)
    turned = (low >= -most) & (high <= most + 1)
    if not (upright | turned).all():
        return None
    sign = np.where(upright, 1, -1).astype(np.int16)
    codes = (steps.integers * sign[..., None] + form.offset).astype(np.uint8)
    d = np.where(upright, steps.steps, -steps.steps)
    return Blocks(kind, codes.reshape(len(codes), -1), d)


def _with_minimum(steps: Steps, kind: str, low: I16, high: I16) -> Blocks | None:
    """d * n + m with m = d * base: exact wherever that product is a number of 16 bits, since the sum is d * integer."""
    most = (1 << FORMS[kind].bits) - 1
    base = np.zeros(low.shape, np.int16)
    found = np.zeros(low.shape, bool)
    for tried in [-steps.zeros, *(low - np.int16(below) for below in range(most + 1))]:
        fits = (tried <= low) & (high - tried <= most) & ~found
        product = steps.steps.astype(np.float32) * tried
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which is not the same
            fits &= product.astype(np.float16) == product
        base[fits], found[fits] = tried[fits], True
        if found.all():
            codes = (steps.integers - base[..., None]).astype(np.uint8)
            m = (steps.steps.astype(np.float32) * base).astype(np.float16)
            return Blocks(kind, codes.reshape(len(codes), -1), steps.steps, m)
    return None


def exact(layer: Layer, kinds: Sequence[str] = SMALLEST_FIRST) -> AnyBlocks:
    """The weight in the first of these types that holds it; NotWhole with the reason where none does."""
    if isinstance(layer, AffineLinear | CodebookLinear):
        blocks = _own_kind(layer)
        if blocks is not None and blocks.kind in kinds:
            return blocks
        raise NotWhole(f"weights are stored as {layer.encoding.name}, not in equal steps")
    steps = steps_of(layer)
    for kind in kinds:
        if kind in FORMS and (blocks := exact_blocks(steps, kind)) is not None:
            return blocks
    if not any(kind in FORMS for kind in kinds):
        raise NotWhole(f"scales of 16 bits are none of {kinds[0]}")
    low, high = int(steps.integers.min()), int(steps.integers.max())
    raise NotWhole(f"steps from {low} to {high} do not fit {' or '.join(kind for kind in kinds if kind in FORMS)}")


def _own_kind(layer: AffineLinear | CodebookLinear) -> AnyBlocks | None:
    """The blocks that a layer has the numbers of, if there are such: what `layer_of` made of them."""
    block_of_group = layer.group_size // BLOCK if layer.group_size % BLOCK == 0 else 0
    if layer.in_features % BLOCK or (block_of_group == 0 and layer.group_size != 16):
        return None
    if isinstance(layer, CodebookLinear):
        if _is_iq4_nl(layer) and isinstance(layer.scales, np.ndarray) and block_of_group:
            return LevelBlocks("IQ4_NL", layer.codes, _for_blocks(layer.scales, block_of_group, layer.in_features))
        return None
    if isinstance(layer.scales, np.ndarray) and isinstance(layer.minima, np.ndarray):
        kind = {4: "Q4_1", 5: "Q5_1"}.get(layer.bits)
        if kind is None or not block_of_group:
            return None
        d, m = (_for_blocks(values, block_of_group, layer.in_features) for values in (layer.scales, layer.minima))
        return Blocks(kind, layer.codes, d, m)
    return _k_kind(layer)


def _k_kind(layer: AffineLinear) -> KBlocks | None:
    scales, minima = layer.scales, layer.minima
    for kind, form in K_FORMS.items():
        wanted = (form.bits, form.group, form.stat_bits, form.n_groups, not form.has_min)
        if layer.in_features % SUPER_BLOCK or not isinstance(scales, Products) or isinstance(minima, np.ndarray):
            return None
        if wanted == (layer.bits, layer.group_size, scales.bits, scales.groups, layer.symmetric):
            if minima is None:
                return KBlocks(kind, layer.codes, scales.codes, scales.units)
            return KBlocks(kind, layer.codes, scales.codes, scales.units, minima.codes, minima.units)
    return None


def _is_iq4_nl(layer: CodebookLinear) -> bool:
    beside = layer.outliers is not None or (layer.input_scales is not None and bool((layer.input_scales != 1).any()))
    levels = layer.level_values()
    return not beside and len(levels) == 16 and bool((levels == np.array(LEVELS["IQ4_NL"], np.float32)).all())


def _for_blocks(values: F16, blocks_of_group: int, n_inputs: int) -> F16:
    """[rows, G] -> [rows, in / 32]"""
    return np.repeat(values, blocks_of_group, axis=1)[:, : n_inputs // BLOCK]
