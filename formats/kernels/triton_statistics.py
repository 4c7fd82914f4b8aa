"""What a code is scaled by: the statistics of groups, in one level or two, and the factors of inputs."""

import triton
import triton.language as tl

from formats.encoding.statistics import ABSMAX_BLOCK as _ABSMAX_BLOCK
from formats.kernels.layout import DOUBLE_QUANT as _DOUBLE_QUANT
from formats.kernels.layout import PLAIN as _PLAIN
from formats.kernels.layout import PRODUCTS as _PRODUCTS
from formats.kernels.layout import TWO_LEVEL as _TWO_LEVEL
from formats.kernels.triton_planes import code_at, part, small_float

PRODUCTS = tl.constexpr(_PRODUCTS)
PLAIN = tl.constexpr(_PLAIN)
TWO_LEVEL = tl.constexpr(_TWO_LEVEL)
DOUBLE_QUANT = tl.constexpr(_DOUBLE_QUANT)
ABSMAX_BLOCK = tl.constexpr(_ABSMAX_BLOCK)


@triton.jit
def group_at(section, offsets, inputs, keep, L: tl.constexpr):
    """The groups of inputs; one that there is not where `keep` is False."""
    if L.has_order:
        places = tl.load(part(section, offsets[L.at_order], tl.uint32) + inputs, mask=keep, other=2 * L.n_inputs)
        inputs = places.to(tl.int32)
    return inputs // L.group_size


@triton.jit
def groups_from(section, offsets, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """The group of every span of BLOCK_K inputs from `first` on."""
    inputs = first + L.span * tl.arange(0, BLOCK_K // L.span)
    return group_at(section, offsets, inputs, inputs < L.n_inputs, L)


@triton.jit
def two_level(section, offsets, rows, groups, keep, L: tl.constexpr, AT: tl.constexpr):
    """SPEC 7.9.1: s * (code - z) of every row and group.  -> f32, as rows and groups broadcast"""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    N_PLANES: tl.constexpr = L.stat_bits // 8 + L.stat_bits // 4 % 2 + L.stat_bits // 2 % 2 + L.stat_bits % 2
    at = rows.to(tl.int64) * N_GROUPS + groups  # packed as one row
    codes = small_float(code_at(section, offsets, at * 0, at, keep, 1, L.stat_bits, AT))
    sets = rows.to(tl.int64) // L.stat_rows * N_GROUPS + groups
    scale = tl.load(part(section, offsets[AT + N_PLANES], tl.float16) + sets, mask=keep, other=0.0)
    zero = tl.load(part(section, offsets[AT + N_PLANES + 1], tl.float16) + sets, mask=keep, other=0.0)
    return scale.to(tl.float32) * (codes - zero.to(tl.float32))


@triton.jit
def unit_products(section, offsets, rows, groups, keep, L: tl.constexpr, AT: tl.constexpr):
    """SPEC 7.17: unit * code of every row and group.  -> f32, as rows and groups broadcast"""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    N_UNITS: tl.constexpr = (N_GROUPS + L.stat_groups - 1) // L.stat_groups
    N_PLANES: tl.constexpr = L.stat_bits // 8 + L.stat_bits // 4 % 2 + L.stat_bits // 2 % 2 + L.stat_bits % 2
    at = rows.to(tl.int64) * N_GROUPS + groups  # packed as one row
    codes = small_float(code_at(section, offsets, at * 0, at, keep, 1, L.stat_bits, AT))
    if L.symmetric:
        codes -= 1 << (L.stat_bits - 1)
    units = part(section, offsets[AT + N_PLANES], tl.float16) + rows.to(tl.int64) * N_UNITS + groups // L.stat_groups
    return tl.load(units, mask=keep, other=0.0).to(tl.float32) * codes


@triton.jit
def scales_of(section, tables, offsets, rows, groups, keep, L: tl.constexpr):
    """The scale of every row and group.  rows, groups and keep broadcast against each other  -> f32"""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    keep = keep & (groups < N_GROUPS)
    at = rows.to(tl.int64) * N_GROUPS + groups
    if L.scales == PLAIN:
        scales = tl.load(part(section, offsets[L.at_scales], tl.float16) + at, mask=keep, other=0.0).to(tl.float32)
    elif L.scales == TWO_LEVEL:
        scales = two_level(section, offsets, rows, groups, keep, L, L.at_scales)
    elif L.scales == PRODUCTS:
        scales = unit_products(section, offsets, rows, groups, keep, L, L.at_scales)
    elif L.scales == DOUBLE_QUANT:
        codes = tl.load(part(section, offsets[L.at_scales], tl.uint8) + at, mask=keep, other=0)
        mapped = tl.load(tables + L.at_map + codes.to(tl.int32))
        absmax = part(section, offsets[L.at_scales + 1], tl.float32) + at // ABSMAX_BLOCK
        mean = tl.load(part(section, offsets[L.at_scales + 2], tl.float32))
        scales = mapped * tl.load(absmax, mask=keep, other=0.0) + mean
    else:
        of_row = part(section, offsets[L.at_scales], tl.float32) + rows
        scales = tl.load(of_row + groups * 0, mask=keep, other=0.0)
    return scales


@triton.jit
def zeros_of(section, offsets, rows, groups, keep, L: tl.constexpr):
    """The zero of every row and group of a uniform encoding, likewise."""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    keep = keep & (groups < N_GROUPS)
    if L.symmetric:
        zeros = tl.zeros(keep.shape, tl.float32) + (1 << (L.bits - 1))
    elif L.stat_bits > 0:
        zeros = two_level(section, offsets, rows, groups, keep, L, L.at_zeros)
    else:
        at = rows.to(tl.int64) * N_GROUPS + groups
        zeros = small_float(code_at(section, offsets, at * 0, at, keep, 1, L.bits, L.at_zeros))
    return zeros


@triton.jit
def minima_of(section, offsets, rows, groups, keep, L: tl.constexpr):
    """The minimum of every row and group of an affine encoding, as `scales_of`."""
    N_GROUPS: tl.constexpr = (L.n_inputs + L.group_size - 1) // L.group_size
    keep = keep & (groups < N_GROUPS)
    if L.stat_bits > 0:
        minima = -unit_products(section, offsets, rows, groups, keep, L, L.at_minima)
    else:
        at = rows.to(tl.int64) * N_GROUPS + groups
        minima = tl.load(part(section, offsets[L.at_minima], tl.float16) + at, mask=keep, other=0.0).to(tl.float32)
    return minima


@triton.jit
def scales_from(section, tables, offsets, rows, keep, first, L: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scale of every span of BLOCK_K inputs from `first` on.  -> [BLOCK_N, spans] f32"""
    groups = groups_from(section, offsets, first, L, BLOCK_K)
    return scales_of(section, tables, offsets, rows[:, None], groups[None, :], keep[:, None], L)


@triton.jit
def scaled(units, scales, L: tl.constexpr):
    """units [BLOCK_N, BLOCK_K] times the scales [BLOCK_N, spans] of their groups: the weight, neither outliers nor
    input scales counted in."""
    spans = tl.reshape(units, (scales.shape[0], scales.shape[1], L.span)) * scales[:, :, None]
    return tl.reshape(spans, units.shape)


@triton.jit
def with_minima(weights, section, offsets, rows, keep, first, L: tl.constexpr):
    """`weights` [BLOCK_N, BLOCK_K] from input `first` on, plus the minima of their groups where there are any."""
    if L.has_minima:
        groups = groups_from(section, offsets, first, L, weights.shape[1])
        minima = minima_of(section, offsets, rows[:, None], groups[None, :], keep[:, None], L)
        spans = tl.reshape(weights, (weights.shape[0], weights.shape[1] // L.span, L.span)) + minima[:, :, None]
        weights = tl.reshape(spans, weights.shape)
    return weights


@triton.jit
def input_scales_of(section, offsets, inputs, keep, L: tl.constexpr):
    """The factors of these inputs, if there are any, else ones.  -> f32"""
    if L.has_input_scales:
        scales = tl.load(part(section, offsets[L.at_input_scales], tl.float16) + inputs, mask=keep, other=0.0)
        factors = scales.to(tl.float32)
    else:
        factors = tl.full(inputs.shape, 1.0, tl.float32)
    return factors
