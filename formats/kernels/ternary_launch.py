"""The launches of the ternary kernels: `triton_launch` comes here for their encodings."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape, TernaryDict, TernaryRans
from formats.encoding.ternary_rans import LANES, SLOTS
from formats.kernels.blocks import ceil_div
from formats.kernels.product import splits_launch
from formats.kernels.triton_lanes import SYMBOLS, decode_lanes, fill_tables, multiply_lanes
from formats.kernels.triton_phrases import decode_phrases, multiply_phrases
from formats.ternary import phrases, symbol_digits

CODEWORDS = {1: 16, 2: 8, 4: 8, 8: 4}
"""At a time, by tokens: 32 values of each, of which every token has an activation."""
DECODED_CODEWORDS = 16
ONE_WARP: dict[str, Any] = {"num_warps": 1}
SLOTS_AT_A_TIME = 512


def multiply(x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
    """x [tokens, in] times the transposed weight, of a few tokens; sums are float32."""
    n_tokens, n_outputs = len(x), shape[0]
    y = x.new_empty((n_tokens, n_outputs))
    options = _options(encoding, shape, exact=False)
    tokens = min(int(triton.next_power_of_2(n_tokens)), max(CODEWORDS))
    groups = ceil_div(n_tokens, tokens)
    offsets = offsets_of(encoding, shape)
    if isinstance(encoding, TernaryDict):
        arguments = (x, section, _phrases(encoding, x.device), y, offsets, n_tokens, n_outputs)
        multiply_phrases[(n_outputs, groups)](*arguments, BLOCK_M=tokens, CODEWORDS=CODEWORDS[tokens], **options)
        return y
    n_segments = ceil_div(shape[1], options["SEGMENT"])
    sums = y if n_segments == 1 else x.new_empty((n_segments, n_tokens, n_outputs), dtype=torch.float32)
    grid = ceil_div(n_outputs, LANES), n_segments, groups
    multiply_lanes[grid](
        x, section, *_tables(section, offsets), sums, offsets, n_tokens, n_outputs, BLOCK_M=tokens, **options
    )
    if sums is not y:
        splits_launch(y.numel(), n_segments)(sums, y)
    return y


def decode(section: Tensor, ids: Tensor | None, encoding: MatrixEncoding, shape: Shape, weight: Tensor) -> None:
    """All rows, or those of ids [n] i64, into weight [n, in]."""
    options = _options(encoding, shape, exact=True) | {"HAS_IDS": ids is not None}
    n_rows, offsets, by = len(weight), offsets_of(encoding, shape), section if ids is None else ids
    if isinstance(encoding, TernaryDict):
        table = _phrases(encoding, section.device)
        decode_phrases[(n_rows,)](section, table, by, weight, offsets, CODEWORDS=DECODED_CODEWORDS, **options)
    else:
        grid = n_rows if ids is not None else ceil_div(n_rows, LANES), ceil_div(shape[1], options["SEGMENT"])
        decode_lanes[grid](section, *_tables(section, offsets), by, weight, offsets, shape[0], **options)


def offsets_of(encoding: MatrixEncoding, shape: Shape) -> tuple[int, ...]:
    """The first byte of each part of a section."""
    return tuple(part.offset_bytes for part in encoding.parts(shape))


def _options(encoding: MatrixEncoding, shape: Shape, exact: bool) -> dict[str, Any]:
    """What a kernel is compiled for; exact: its multiplications and additions are not fused (SPEC 7.6.2)."""
    assert isinstance(encoding, TernaryDict | TernaryRans)
    found = {"N_INPUTS": shape[1], "SCALED": encoding.input_scales, "enable_fp_fusion": not exact}
    if isinstance(encoding, TernaryRans):
        found["SEGMENT"] = min(encoding.segment, shape[1])
    return found | ONE_WARP


def _tables(section: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the frequencies of a section say (`fill_tables`), and the values of every symbol."""
    slots = torch.empty(SLOTS, dtype=torch.uint8, device=section.device)
    symbols = torch.empty(SYMBOLS.value, dtype=torch.int32, device=section.device)
    grid = (SLOTS // SLOTS_AT_A_TIME,)
    fill_tables[grid](section, slots, symbols, offsets[0], BLOCK=SLOTS_AT_A_TIME, num_warps=8, enable_fp_fusion=True)
    return slots, symbols, _digits(section.device)


def _phrases(encoding: TernaryDict, device: torch.device) -> Tensor:
    return _phrase_table(encoding.share_low, encoding.share_high, device)


@functools.lru_cache(maxsize=256)
def _phrase_table(low: int, high: int, device: torch.device) -> Tensor:
    """The dictionary [65536, 2] i32, the lower half of every phrase first: half a megabyte, kept."""
    return torch.from_numpy(phrases(low, high).view(np.int32).copy()).to(device)


@functools.cache
def _digits(device: torch.device) -> Tensor:
    return torch.from_numpy(symbol_digits().view(np.int32).copy()).to(device)
