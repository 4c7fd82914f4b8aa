"""Decoding `uniform` sections with torch on the CPU.

A byte of packed codes is widened to the word that holds one code per byte by shift-or-mask steps on
whole vectors: no strided writes, no tables. The result equals `formats.layer.dequantize` bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from formats.encoding import Uniform, plane_widths

# Per plane width: the word that one packed byte becomes, and the (shift, mask) steps that spread its fields
# over the word's bytes, lowest field in the lowest byte.
_SPREAD: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


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


def unpack_codes(parts: Mapping[str, Tensor], field: str, bits: int) -> Tensor:
    """The integers of `field` ("codes" or "zeros") as u8, [rows, at least as many as were stored]."""
    widths = plane_widths(bits)
    codes = unpack_plane(parts[f"{field}.{widths[0]}"], widths[0])
    for index, width in enumerate(widths[1:], 1):
        fields = unpack_plane(parts[f"{field}.{width}"], width, low_bit=sum(widths[:index]))
        n = min(codes.shape[1], fields.shape[1])  # a narrow plane is padded to more fields than a wide one
        codes = fields[:, :n].bitwise_or_(codes[:, :n])
    return codes


def unpack_zeros(parts: Mapping[str, Tensor], encoding: Uniform) -> Tensor:
    """The zeros [out, G] u8 of a section; [out, 1] when they are all the same."""
    out_features, n_groups = parts["scales"].shape
    if encoding.symmetric:
        return torch.full((out_features, 1), 1 << (encoding.bits - 1), dtype=torch.uint8)
    flat = unpack_codes(parts, "zeros", encoding.bits)[0]
    return flat[: out_features * n_groups].view(out_features, n_groups)


def decode_uniform(parts: Mapping[str, Tensor], zeros: Tensor, in_features: int, encoding: Uniform) -> Tensor:
    """The weight [rows, in_features] f32 of a section's parts and zeros, or of the same rows of each of them.

    Input scales (SPEC 7.5.1) are not applied: whoever multiplies scales the fewer activations instead.
    """
    codes = unpack_codes(parts, "codes", encoding.bits)
    scales = parts["scales"].float()  # [rows, G]
    zeros = zeros.expand(scales.shape)
    weight = torch.empty(len(codes), in_features)
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
    out = out.unflatten(1, (groups, out.shape[1] // groups))
    out.copy_(codes.unflatten(1, out.shape[1:]))
    out.sub_(zeros.float()[:, :, None]).mul_(scales[:, :, None])
