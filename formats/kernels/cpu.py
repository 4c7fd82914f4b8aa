"""Decoding `uniform` sections with torch on the CPU.

A byte of packed codes is widened to the word that holds one code per byte by shift-or-mask steps on
whole vectors: no strided writes, no tables. The result equals `formats.layer.dequantize` bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from formats.bitpack import plane_widths
from formats.encoding import Uniform

# Per plane width: the word that one packed byte becomes, and the (shift, mask) steps that spread its fields
# over the word's bytes, lowest field in the lowest byte.
_SPREAD: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


def unpack_plane(plane: Tensor, width: int) -> Tensor:
    """plane: [rows, words] int32 -> its fields [rows, words * 32 / width] u8, padding included."""
    packed = plane.view(torch.uint8)
    if width == 8:
        return packed
    word, steps = _SPREAD[width]
    spread = packed.to(word)
    for shift, mask in steps:
        spread = (spread | (spread << shift)).bitwise_and_(mask)
    return spread.view(torch.uint8)


def unpack_codes(parts: Mapping[str, Tensor], field: str, bits: int) -> Tensor:
    """The integers of `field` ("codes" or "zeros") as u8, [rows, at least as many as were stored]."""
    codes: Tensor | None = None
    low_bit = 0
    for width in plane_widths(bits):
        fields = unpack_plane(parts[f"{field}.{width}"], width)
        if codes is None:
            codes = fields
        else:
            n = min(codes.shape[1], fields.shape[1])  # a narrow plane is padded to more fields than a wide one
            codes = codes[:, :n] | (fields[:, :n] << low_bit)
        low_bit += width
    assert codes is not None
    return codes


def decode_uniform(parts: Mapping[str, Tensor], in_features: int, encoding: Uniform) -> Tensor:
    """The weight [rows, in_features] f32 of a section's parts, or of the same rows of each of them.

    Input scales (SPEC 7.5.1) are not applied: whoever multiplies scales the fewer activations instead.
    """
    codes = unpack_codes(parts, "codes", encoding.bits)
    scales = parts["scales"].float()  # [rows, G]
    rows, n_groups = scales.shape
    if encoding.symmetric:
        zeros = torch.full_like(codes[:, :1], 1 << (encoding.bits - 1)).expand(rows, n_groups)
    else:
        zeros = unpack_codes(parts, "zeros", encoding.bits)[:, :n_groups]
    weight = torch.empty(rows, in_features)
    full = in_features // encoding.group_size
    stop = full * encoding.group_size
    _decode(codes[:, :stop], zeros[:, :full], scales[:, :full], weight[:, :stop])
    if stop < in_features:
        _decode(codes[:, stop:in_features], zeros[:, full:], scales[:, full:], weight[:, stop:])
    return weight


def _decode(codes: Tensor, zeros: Tensor, scales: Tensor, out: Tensor) -> None:
    """scale * (code - zero) (SPEC 7.5) over whole groups, written to out [rows, G * g]."""
    if not out.numel():
        return
    groups = zeros.shape[1]
    shape = (len(codes), groups, codes.shape[1] // groups)
    # The difference of two codes is exact in 16 bits, half as wide as float32: one pass less over memory.
    steps = codes.unflatten(1, shape[1:]).to(torch.int16).sub_(zeros.to(torch.int16)[:, :, None])
    torch.mul(steps, scales[:, :, None], out=out.unflatten(1, shape[1:]))
