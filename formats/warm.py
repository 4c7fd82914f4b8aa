"""Make a file's kernels ready on a GPU: compiled, and the fastest blocks found, before the first token needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from formats.device import default_dtype
from formats.encoding import INPUT_SCALES, MatrixEncoding, Shape
from formats.errors import KernelError
from formats.header import TensorEntry
from formats.kernels.layout import is_ternary, layout_of
from formats.reader import QtmFile
from formats.tensors import section_tensor
from formats.upload import Uploader

TOKENS = 1, 16, 512, 2048
"""Of each regime: generation, small batches, prompts, long prompts, which are for cuBLAS unless tiles are faster."""
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmed:
    """One class of shapes: which blocks are fastest, in milliseconds, and what the blocks chosen untried take."""

    encoding: str
    shape: Shape
    tokens: int
    blocks: dict[str, int]
    milliseconds: float
    untried_milliseconds: float


def kinds_of(file: QtmFile) -> list[TensorEntry]:
    """One tensor of each kind that shares its kernels and blocks."""
    kinds: dict[Any, TensorEntry] = {}
    for entry in file.tensors.values():
        if is_ternary(entry.encoding):
            scaled = INPUT_SCALES in (part.name for part in entry.encoding.parts(entry.shape))
            segment = min(getattr(entry.encoding, "segment", 0), entry.shape[1])
            kinds.setdefault((entry.encoding.name, segment, scaled, entry.shape), entry)
        elif isinstance(entry.encoding, MatrixEncoding):
            try:
                layout, _ = layout_of(entry.encoding, entry.shape)
            except KernelError:
                continue  # decoded when it is loaded
            kinds.setdefault((layout, entry.shape), entry)
    return list(kinds.values())


def warm(
    file: QtmFile, device: torch.device, tokens: Sequence[int] = TOKENS, time: Timer | None = None
) -> Iterator[Warmed]:
    """Try and compile, one class of shapes after the other; what was found is written at the end of each.

    device: one that `ready_device` gave. time: milliseconds of a call, by default Triton's.
    """
    for entry in kinds_of(file):
        yield from _warm(file, entry, device, tokens, time)


def _warm(
    file: QtmFile, entry: TensorEntry, device: torch.device, tokens: Sequence[int], time: Timer | None
) -> Iterator[Warmed]:
    from triton.testing import do_bench

    from formats.kernels import triton_launch, tuning

    is_real, time = time is None, time or do_bench
    encoding, shape = entry.encoding, entry.shape
    assert isinstance(encoding, MatrixEncoding)
    section = Uploader(device).put(section_tensor(file, entry))
    dtype = default_dtype(device)
    triton_launch.decode_rows(section, torch.zeros(1, dtype=torch.int64, device=device), encoding, shape)
    triton_launch.decode(section, encoding, shape, dtype)
    if not is_ternary(encoding):  # no blocks of theirs are chosen
        yield from _tuned(section, encoding, shape, device, tokens, time)
    for n_tokens in tuning.CLASSES if is_real else ():  # whatever number comes, its kernel is compiled
        triton_launch.multiply(torch.ones((n_tokens, shape[1]), dtype=dtype, device=device), section, encoding, shape)


def _tuned(
    section: Tensor,
    encoding: MatrixEncoding,
    shape: Shape,
    device: torch.device,
    tokens: Sequence[int],
    time: Timer,
) -> Iterator[Warmed]:
    """Each number of tokens with the blocks that are fastest."""
    from formats.kernels import triton_launch, tuning

    layout, _ = layout_of(encoding, shape)
    dtype = default_dtype(device)
    for n_tokens in tokens:
        x = torch.ones((n_tokens, shape[1]), dtype=dtype, device=device)
        with triton_launch.on_device_of(x):
            has_tiles = triton_launch.has_tiles(dtype)

        def product(blocks: Any, x: Tensor = x) -> Tensor:
            return triton_launch.multiply_with(x, section, encoding, shape, blocks)

        with triton_launch.on_device_of(x):
            best, found = tuning.tune(
                layout, n_tokens, shape[0], device, lambda blocks: time(lambda: product(blocks)), has_tiles
            )
        tuning.save(device)
        untried = next(iter(found))
        yield Warmed(
            encoding=encoding.name,
            shape=shape,
            tokens=n_tokens,
            blocks=asdict(best),
            milliseconds=found[best],
            untried_milliseconds=found[untried],
        )
