"""Decoding sections with torch on the CPU.

A byte of packed codes is widened to the word that holds one code per byte by shift-or-mask steps on
whole vectors: no strided writes, no tables. Results equal `formats.layer.dequantize` bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor

from formats.encoding.base import PartShapes
from formats.encoding.planes import plane_widths

Rows: TypeAlias = slice | Tensor
"""Which rows of a matrix: a slice, or their numbers [n] i64 in any order."""

# Per plane width: the word that one packed byte becomes, and the (shift, mask) steps that spread its fields
# over the word's bytes, lowest field in the lowest byte.
_SPREAD: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
# torch has few operations on unsigned words: they are carried as signed ones (`unsigned` widens them).
_SIGNED = {"<u2": "<i2", "<u4": "<i4"}
_UNSIGNED_MASK = {torch.int16: 0xFFFF, torch.int32: 0xFFFFFFFF}


def as_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """The parts of a section as tensors over the same memory, u16 and u32 as i16 and i32 of the same bits."""
    signed = {name: array.view(_SIGNED.get(array.dtype.str, array.dtype)) for name, array in arrays.items()}
    with warnings.catch_warnings():
        # The mapping is read-only, which torch cannot express; nothing here writes to it.
        warnings.simplefilter("ignore", UserWarning)
        return {name: torch.from_numpy(array) for name, array in signed.items()}


def as_arrays(held: Mapping[str, Tensor], parts: PartShapes) -> dict[str, npt.NDArray[Any]]:
    """The way back, of some parts."""
    return {name: held[name].numpy().view(dtype) for name, dtype, _ in parts}


def unsigned(words: Tensor) -> Tensor:
    """The numbers i64 in words that `as_tensors` made signed."""
    return words.long() & _UNSIGNED_MASK[words.dtype]


def row_numbers(index: Rows, n_rows: int) -> Tensor:
    """The numbers i64 of the rows that `index` takes of `n_rows`."""
    return torch.arange(n_rows)[index]


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entry of every code u8, in the shape of `codes`. By `index_select`, a quarter of the time of indexing."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def unpack_plane(plane: Tensor, width: int, low_bit: int = 0) -> Tensor:
    """plane: [rows, words] int32 -> its fields << low_bit, [rows, words * 32 / width] u8, padding included."""
    packed = plane.view(torch.uint8)
    if width == 8:
        return packed
    word, steps = _SPREAD[width]
    spread = packed.to(word)
    for shift, mask in steps:
        spread = (spread << shift).bitwise_or_(spread).bitwise_and_(mask)
    if low_bit:
        spread <<= low_bit  # on whole words: torch shifts bytes one by one
    return spread.view(torch.uint8)


def unpack_codes(planes: Sequence[Tensor], bits: int, low_bit: int = 0) -> Tensor:
    """The integers in planes << low_bit, widest plane first, as u8: [rows, at least as many as were stored]."""
    widths = plane_widths(bits)
    codes = unpack_plane(planes[0], widths[0], low_bit)
    for index, (plane, width) in enumerate(zip(planes[1:], widths[1:], strict=True), 1):
        fields = unpack_plane(plane, width, low_bit + sum(widths[:index]))
        n = min(codes.shape[1], fields.shape[1])  # a narrow plane is padded to more fields than a wide one
        codes = fields[:, :n].bitwise_or_(codes[:, :n])
    return codes


def decode_uniform(codes: Tensor, zeros: Tensor | float, scales: Tensor, group_size: int) -> Tensor:
    """The weight scale * (code - zero) [rows, in] f32 (SPEC 7.5).

    codes: [rows, in] u8; zeros: [rows, G] f32, or one for all; scales: [rows, G] f32
    """
    weight = torch.empty(codes.shape)
    for (out, groups), (part, _) in zip(_by_group(weight, group_size), _by_group(codes, group_size), strict=True):
        out.copy_(part)
        out.sub_(zeros[:, groups, None] if isinstance(zeros, Tensor) else zeros).mul_(scales[:, groups, None])
    return weight


def scale_groups(weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """`weight` [rows, in] f32 times the scales [rows, G] f32 of its groups, in place (SPEC 7.11)."""
    for out, groups in _by_group(weight, group_size):
        out.mul_(scales[:, groups, None])
    return weight


def add_groups(weight: Tensor, minima: Tensor, group_size: int) -> Tensor:
    """`weight` [rows, in] f32 plus the minima [rows, G] f32 of its groups, in place (SPEC 7.17)."""
    for out, groups in _by_group(weight, group_size):
        out.add_(minima[:, groups, None])
    return weight


def _by_group(matrix: Tensor, group_size: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [rows, groups, inputs of one] of a matrix [rows, in], and which groups: the whole ones and a short last."""
    full = matrix.shape[1] // group_size
    stop = full * group_size
    if full:
        yield matrix[:, :stop].unflatten(1, (full, group_size)), slice(full)
    if stop < matrix.shape[1]:
        yield matrix[:, None, stop:], slice(full, None)


def add_outliers(weight: Tensor, row_ptr: Tensor, columns: Tensor, values: Tensor, index: Rows) -> None:
    """Add the sparse values (SPEC 7.10) of the rows that `weight` [rows of index, in] f32 holds to it, in place."""
    starts, stops = unsigned(row_ptr[:-1][index]), unsigned(row_ptr[1:][index])
    counts = stops - starts
    rows = torch.repeat_interleave(counts)  # of each value, its row in `weight`
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    positions = starts[rows] + within
    weight[rows, unsigned(columns[positions])] += values[positions].float()
