"""Launches that are the same each time but for their tensors: Triton looks a kernel up once, and not for every token.

What it looks for takes it longer than a small product takes a GPU: the types and alignments of all arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""Bytes; a kernel that was compiled for aligned tensors reads so many at once."""


class Launch:
    """`kernel` on `grid` with all its arguments but the tensors, which come first; always on one current device."""

    def __init__(self, kernel: Any, grid: Sequence[int], numbers: tuple[Any, ...], **options: Any) -> None:
        self._first = kernel[tuple(grid)]
        self._names, self._grid = kernel.arg_names, (*grid, 1, 1)[:3]
        self._numbers, self._options = numbers, options
        self._again: Callable[..., Any] | None = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        # On the CPU they are interpreted, or compiled for a GPU that is not there.
        may_keep = tensors[0].is_cuda and not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)
        if self._again is not None and may_keep:
            self._again(*tensors, *self._rest)
            return
        compiled = self._first(*tensors, *self._numbers, **self._options)
        if compiled is not None and may_keep:
            constants = self._names[len(tensors) + len(self._numbers) :]
            self._rest = *self._numbers, *(self._options[name] for name in constants)
            self._again = compiled[self._grid]
