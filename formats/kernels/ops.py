"""The kernels as operations of torch, one call each: torch.compile and CUDA graphs take them whole.

An operation's arguments are tensors and strings, so encoding and shape come as a tag.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape, encoding_from_fields
from formats.errors import FormatError
from formats.kernels.registry import load_kernels


def tag_of(encoding: MatrixEncoding, shape: Shape) -> str:
    """Encoding and shape as a string."""
    return json.dumps([encoding.fields(), list(shape)], sort_keys=True)


@functools.lru_cache(maxsize=4096)
def from_tag(tag: str) -> tuple[MatrixEncoding, Shape]:
    """What `tag_of` was given."""
    fields, shape = json.loads(tag)
    encoding = encoding_from_fields(fields)
    if not isinstance(encoding, MatrixEncoding):
        raise FormatError(f"{encoding.name}: is no matrix")
    return encoding, tuple(shape)


@torch.library.custom_op("qtool::linear", mutates_args=())
def linear(x: Tensor, section: Tensor, tag: str) -> Tensor:
    """x [..., in] times the transposed weight in a section [bytes] u8: [..., out] in the dtype of x."""
    encoding, shape = from_tag(tag)
    tokens = x.reshape(-1, shape[1]).contiguous()  # a kernel takes one row behind the other
    y = load_kernels(x.device.type).multiply(tokens, section, encoding, shape)
    return y.view(*x.shape[:-1], shape[0])


@linear.register_fake
def _(x: Tensor, section: Tensor, tag: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], from_tag(tag)[1][0]))


def _keep_section(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    _, ctx.section, ctx.tag = inputs


@functools.partial(linear.register_autograd, setup_context=_keep_section)
def _(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """At x: what is packed has none."""
    encoding, shape = from_tag(ctx.tag)
    weight = load_kernels(gradient.device.type).decode(ctx.section, encoding, shape, gradient.dtype)
    return gradient @ weight, None, None


@torch.library.custom_op("qtool::rows", mutates_args=())
def rows(ids: Tensor, section: Tensor, tag: str) -> Tensor:
    """Rows [...] i64 of the weight in a section [bytes] u8: [..., in] f32."""
    encoding, shape = from_tag(tag)
    found = load_kernels(section.device.type).decode_rows(section, ids.reshape(-1).contiguous(), encoding, shape)
    return found.view(*ids.shape, shape[1])


@rows.register_fake
def _(ids: Tensor, section: Tensor, tag: str) -> Tensor:
    return section.new_empty((*ids.shape, from_tag(tag)[1][1]), dtype=torch.float32)
