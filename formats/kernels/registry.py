"""Every way to multiply by a section, with one signature: the numpy reference, torch on the CPU, Triton on a GPU.

A section comes as it lies in the file, as bytes [n] u8; encoding and shape say what they mean. `load_kernels` imports
what a device needs when it is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from formats.encoding import MatrixEncoding, Shape
from formats.errors import KernelError

MODULES = {
    "reference": "formats.kernels.reference",
    "cpu": "formats.kernels.cpu_linear",
    "cuda": "formats.kernels.triton_launch",
}


class Kernels(Protocol):
    """What each module has."""

    def multiply(self, x: Tensor, section: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
        """x [tokens, in] times the transposed weight: [tokens, out] in the dtype of x.

        Sums are float32 at least, but for those of cuBLAS on GPUs before Ampere. Rows of x lie one behind the other.
        """
        ...

    def decode_rows(self, section: Tensor, rows: Tensor, encoding: MatrixEncoding, shape: Shape) -> Tensor:
        """Rows [n] i64, in any order and more than once, of the weight: [n, in] f32, bit for bit."""
        ...

    def decode(self, section: Tensor, encoding: MatrixEncoding, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], bit for bit in float32 and rounded once to other dtypes."""
        ...


@functools.cache
def load_kernels(name: str) -> Kernels:
    """The kernels of `MODULES`; by the type of a device, or "reference"."""
    if name not in MODULES:
        raise KernelError(f"device {name!r}: there are no kernels for it; use cpu or cuda")
    return cast(Kernels, importlib.import_module(MODULES[name]))
