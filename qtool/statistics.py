"""Second-level statistics: the scales and zeros of groups, themselves rounded (SPEC 7.9, 7.10)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from formats.encoding.statistics import ABSMAX_BLOCK
from formats.layer import DoubleQuant, TwoLevel, decode, dynamic_map

FP16_TINY = 2.0**-24  # the smallest scale that fp16 stores; an all-zero group gets it
MAX_ZERO = 1024.0
"""fp16 tells such a zero from its neighbours by half a code; sets whose values differ less have a coarser step."""


def round_two_level(values: Tensor, bits: int, rows: int) -> tuple[TwoLevel, Tensor]:
    """values [G, out] in `bits` bits, min to max over each set of `rows` rows of one group (SpQR, arXiv 2306.03078).

    -> (as stored, what that decodes to [G, out] f32)
    """
    out = values.shape[1]
    padding = -out % rows
    sets = torch.cat([values, values[:, -1:].expand(-1, padding)], 1).unflatten(1, (-1, rows))  # [G, R, rows]
    low, high = sets.amin(2), sets.amax(2)
    step = torch.maximum((high - low) / (2**bits - 1), torch.maximum(low.abs(), high.abs()) / MAX_ZERO)
    scales = step.half().float().clamp_(min=FP16_TINY)
    zeros = (-low / scales).half().float()
    scale, zero = (each[:, :, None] for each in (scales, zeros))
    codes = torch.round(sets / scale + zero).clamp_(0, 2**bits - 1)
    decoded = decode(codes, scale, zero).flatten(1)[:, :out].contiguous()
    stored = TwoLevel(
        codes=by_row(codes.flatten(1)[:, :out], np.uint8),
        scales=by_row(scales, np.float16),
        zeros=by_row(zeros, np.float16),
        bits=bits,
        rows=rows,
    )
    return stored, decoded


def by_row(transposed: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """Statistics [G, n] as the file has them: numpy [n, G], contiguous."""
    return np.ascontiguousarray(transposed.numpy().T.astype(dtype))


def round_double(scales: Tensor) -> tuple[DoubleQuant, Tensor]:
    """scales [G, out] in 8 bits, as QLoRA's double quantization (arXiv 2305.14314) rounds them.

    -> (as stored, what that decodes to [G, out] f32)
    """
    values = scales.T.contiguous()  # [out, G]: blocks run over rows
    mean = values.mean()
    flat = (values - mean).flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % ABSMAX_BLOCK)]).view(-1, ABSMAX_BLOCK)
    absmax = padded.abs().amax(1).clamp_(min=torch.finfo(torch.float32).tiny)
    table = torch.from_numpy(dynamic_map().copy())
    codes = torch.bucketize(padded / absmax[:, None], (table[1:] + table[:-1]) / 2)
    decoded = (table[codes] * absmax[:, None] + mean).flatten()[: len(flat)].view_as(values)
    stored = DoubleQuant(
        codes=codes.flatten()[: len(flat)].view_as(values).numpy().astype(np.uint8),
        absmax=absmax.numpy(),
        mean=mean.view(1).numpy(),
    )
    return stored, decoded.T.contiguous()
