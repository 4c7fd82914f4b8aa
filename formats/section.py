"""The bytes of a section (SPEC 7): packing, unpacking, and what a hash cannot tell."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.bitpack import has_unused_bits, pack_codes, unpack_codes
from formats.encoding import Data, Dense, Encoding, Shape, Uniform, encoding_of, plane_widths
from formats.errors import FormatError
from formats.layer import QuantizedLinear


def part_arrays(data: Data, shape: Shape, encoding: Encoding) -> dict[str, npt.NDArray[Any]]:
    """The parts of a section by name, as views of `data`: no copy."""
    if len(data) != encoding.section_bytes(shape):
        raise FormatError(f"{len(data)} bytes, must be {encoding.section_bytes(shape)} (SPEC 5.4)")
    return {
        part.name: np.frombuffer(data, part.dtype, math.prod(part.shape), part.offset_bytes).reshape(part.shape)
        for part in encoding.parts(shape)
    }


def pack(layer: QuantizedLinear) -> bytes:
    """The section of a layer under `encoding_of(layer)`; `unpack` returns the same layer, bit for bit."""
    encoding = encoding_of(layer)
    values: dict[str, npt.NDArray[Any]] = {"scales": layer.scales}
    values |= zip(encoding.plane_names("codes"), pack_codes(layer.codes, layer.bits), strict=True)
    if layer.zeros is not None:
        zeros = layer.zeros.reshape(1, -1)  # as one row: a row of G zeros alone would be padded to a word
        values |= zip(encoding.plane_names("zeros"), pack_codes(zeros, layer.bits), strict=True)
    if layer.input_scales is not None:
        values["input_scales"] = layer.input_scales
    shape = (layer.out_features, layer.in_features)
    section = bytearray(encoding.section_bytes(shape))
    for name, array in part_arrays(section, shape, encoding).items():
        array[...] = values[name]
    return bytes(section)


def unpack(data: Data, shape: Shape, encoding: Uniform) -> QuantizedLinear:
    """The layer of a `uniform` section; its arrays are copies and outlive `data`."""
    arrays = part_arrays(data, shape, encoding)
    scales = arrays["scales"].astype(np.float16)  # [out, G]

    def integers(field: str, n: int) -> npt.NDArray[np.uint8]:
        return unpack_codes([arrays[name] for name in encoding.plane_names(field)], encoding.bits, n)

    return QuantizedLinear(
        codes=integers("codes", shape[1]),
        scales=scales,
        zeros=None if encoding.symmetric else integers("zeros", scales.size).reshape(scales.shape),
        bits=encoding.bits,
        group_size=encoding.group_size,
        input_scales=arrays["input_scales"].astype(np.float16) if encoding.input_scales else None,
    )


def dense_to_float32(data: Data, shape: Shape, dtype: str) -> npt.NDArray[np.float32]:
    """The values of a `dense` section as float32, exact for every stored type.  -> `shape` f32, a copy"""
    raw = part_arrays(data, shape, Dense(dtype))["values"]
    if dtype == "BF16":  # a bf16 is the upper half of a float32
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)  # in place: `<<` would make a scalar of an array without dimensions
        return wide.view(np.float32)
    return raw.astype(np.float32)


def check_section(data: Data, shape: Shape, encoding: Encoding) -> None:
    """What a hash cannot tell: zero gaps and unused bits, finite scales (SPEC 4.3, 7.4.4, 7.6)."""
    arrays = part_arrays(data, shape, encoding)
    end = 0
    for part in encoding.parts(shape):
        if bytes(data[end : part.offset_bytes]).strip(b"\0"):
            raise FormatError(f"bytes before part {part.name!r} are not zero (SPEC 4.3)")
        end = part.end_bytes
    if isinstance(encoding, Uniform):
        _check_uniform(arrays, shape, encoding)


def check_scales(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """SPEC 7.6, for the parts of a `uniform` section."""
    if not _all_finite(arrays["scales"]):
        raise FormatError("a scale is NaN or infinite (SPEC 7.6)")
    inputs = arrays.get("input_scales", np.ones(1, np.float16))
    if not (_all_finite(inputs) and (inputs > 0).all()):
        raise FormatError("an input scale is NaN, infinite or not above 0 (SPEC 7.6)")


def _all_finite(values: npt.NDArray[np.float16]) -> bool:
    """As np.isfinite, which widens every f16 first and takes twenty times as long."""
    return int((values.view(np.uint16) & 0x7FFF).max()) < 0x7C00


def _check_uniform(arrays: Mapping[str, npt.NDArray[Any]], shape: Shape, encoding: Uniform) -> None:
    check_scales(arrays)
    lengths = {"codes": shape[1]} | ({} if encoding.symmetric else {"zeros": arrays["scales"].size})
    for field, n in lengths.items():
        for name, width in zip(encoding.plane_names(field), plane_widths(encoding.bits), strict=True):
            if has_unused_bits(arrays[name], width, n):
                raise FormatError(f"part {name!r}: bits behind the last code are not zero (SPEC 7.4.4)")
