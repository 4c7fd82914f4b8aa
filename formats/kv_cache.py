"""A transformers cache that keeps keys and values in 4 or 8 bits.

As FlexGen does it (arXiv 2303.06865): groups of up to 64 along the head dimension, each with its smallest value and a
step. But rotated by a Hadamard matrix first, which spreads the few channels where keys are large over all: on the
reference model half the KL divergence at the same size. A token is rounded once, when it arrives, and attention reads
it as it was rounded, so that what a window scores at once and what is generated token by token are the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from formats.errors import KernelError

KV_BITS = (4, 8)
MAX_GROUP = 64
FP16_MAX = 65504.0


class PackedCache(DynamicCache):
    """The cache of one `generate` or of one forward: `model.generate(cache=PackedCache(config, 4))`.

    Grouped queries, sliding windows, beams and cropping are as in transformers' own, from which all but the rounding
    is. KernelError where the model keeps no keys and values, or other bits are asked for.
    """

    def __init__(self, config: PreTrainedConfig, bits: int) -> None:
        if bits not in KV_BITS:
            raise KernelError(f"kv_bits={bits}: must be 4 or 8")
        if getattr(config, "is_encoder_decoder", False):
            raise KernelError(
                f"kv_bits={bits}: {config.model_type} is an encoder-decoder, whose cache is not rounded; leave it out"
            )
        super().__init__(config=config)
        self.bits = bits
        self.layers = [_packed(layer, bits) for layer in self.layers]
        others = sorted({type(layer).__name__ for layer in self.layers if isinstance(layer, DynamicLayer)} - _PACKED)
        if others:
            raise KernelError(
                f"kv_bits={bits}: {config.model_type} has layers whose keys and values are not packed: "
                f"{', '.join(others)}"
            )
        if not any(isinstance(layer, _PackedRows) for layer in self.layers):
            raise KernelError(f"kv_bits={bits}: {config.model_type} has no cache of keys and values to round")

    @property
    def n_bytes(self) -> int:
        """What keys and values take."""
        packed = (layer for layer in self.layers if isinstance(layer, PackedLayer | PackedSlidingWindowLayer))
        held = (states for layer in packed for states in (layer.keys, layer.values))
        return sum(states.nbytes for states in held if states is not None)


class _PackedRows:
    """Put before a layer of transformers: its `keys` and `values` are packed rows, which it joins, cuts and moves."""

    bits: int

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        packed = [pack_rows(states, self.bits) for states in (key_states, value_states)]
        keys, values = super().update(*packed, *args, **kwargs)  # type: ignore[misc]
        return unpack_rows(keys, self.bits, key_states), unpack_rows(values, self.bits, value_states)


class PackedLayer(_PackedRows, DynamicLayer):
    """Attention over all tokens."""

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits = bits


class PackedSlidingWindowLayer(_PackedRows, DynamicSlidingWindowLayer):
    """Attention over the last tokens."""

    def __init__(self, sliding_window: int, bits: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.bits = bits


_PACKED = {PackedLayer.__name__, PackedSlidingWindowLayer.__name__}


def _packed(layer: Any, bits: int) -> Any:
    """The packed form of a layer; those that hold anything else than keys and values stay."""
    if type(layer) is DynamicLayer:
        return PackedLayer(bits)
    if type(layer) is DynamicSlidingWindowLayer:
        return PackedSlidingWindowLayer(layer.sliding_window, bits)
    return layer


def group_of(n: int) -> int:
    """The largest group that divides a head of dimension n, at most MAX_GROUP."""
    return next(group for group in range(min(n, MAX_GROUP), 0, -1) if n % group == 0)


def rotate(rows: Tensor) -> Tensor:
    """Rows [..., n] f32 times a Hadamard matrix, in blocks of the largest power of two that divides a group.

    It is symmetric and orthogonal: rotated twice, rows are what they were, up to rounding.
    """
    group = group_of(rows.shape[-1])
    size = group & -group
    blocks: Tensor = rows.unflatten(-1, (-1, size))
    return (blocks @ _hadamard(size, rows.device)).flatten(-2)


@functools.cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    """[size, size] f32, by Sylvester's construction."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normed: Tensor = matrix / size**0.5
    return normed.to(device)


def pack_rows(states: Tensor, bits: int) -> Tensor:
    """Rows [..., n], rotated, as bytes [..., m] u8: codes (4 bits: two in a byte, the first low), steps, least values.

    Steps and least values are fp16, one of each for a group; codes are chosen against them as stored.
    """
    rotated = rotate(states.float().clamp(-FP16_MAX, FP16_MAX)).clamp_(-FP16_MAX, FP16_MAX)
    grouped = rotated.unflatten(-1, (-1, group_of(states.shape[-1])))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low = low.half()
    step = ((high - low) / (2**bits - 1)).clamp_(0, FP16_MAX).half()
    divisor = step.float().where(step > 0, 1.0)  # all values alike: their code is 0
    codes = ((grouped - low) / divisor).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        codes = pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return torch.cat([codes, step.flatten(-2).view(torch.uint8), low.flatten(-2).view(torch.uint8)], dim=-1)


def unpack_rows(rows: Tensor, bits: int, like: Tensor) -> Tensor:
    """What `pack_rows` made of states with the last dimension and the dtype of `like`."""
    n = like.shape[-1]
    n_codes, n_groups = -(-n * bits // 8), n // group_of(n)
    codes = rows[..., :n_codes]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :n]
    statistics = rows[..., n_codes:].clone(memory_format=torch.contiguous_format).view(torch.float16).float()[..., None]
    step, low = statistics[..., :n_groups, :], statistics[..., n_groups:, :]
    values: Tensor = codes.unflatten(-1, (n_groups, -1)) * step + low
    return rotate(values.flatten(-2)).to(like.dtype)
