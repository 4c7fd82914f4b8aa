"""Blocks that are on a GPU only while they compute (FlexGen, arXiv 2303.06865): the next one is copied meanwhile.

Two slots on the GPU hold a block's sections each. A thread copies from the mapped file to pinned memory and starts
the transfer on a stream of its own; events order it with the kernels, so the host never waits for those. On a CPU the
same steps are taken in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from formats.encoding import align
from formats.modules import QuantLinear

ALIGNMENT = 256
"""Of sections in a slot: what torch's own allocations have."""


@dataclass(eq=False)
class StreamedBlock:
    """A block, and its sections [bytes] u8 on the host: pinned, or over the mapped file."""

    module: nn.Module
    sections: list[tuple[QuantLinear, Tensor]] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(align(len(section), ALIGNMENT) for _, section in self.sections)


class BlockStreamer:
    """Hooks on blocks, in the order in which the model runs them."""

    def __init__(
        self, blocks: Sequence[StreamedBlock], device: torch.device, check_source: Callable[[], None] = lambda: None
    ) -> None:
        """check_source: raises when the sections are no longer what they were; called before each copy."""
        self._check_source = check_source
        self._blocks, self._device, self._on_gpu = blocks, device, device.type == "cuda"
        size = max(block.n_bytes for block in blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._staging = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2 * self._on_gpu)]
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._sent: list[Any] = [None, None]  # events: a slot's block has arrived, and its staging can be filled again
        self._used: list[Any] = [None, None]  # events: the kernels that read a slot are done
        self._coming: tuple[int, int, Future[None]] | None = None  # block, slot, copy
        self._here: tuple[int, int] = (-1, 1)  # block and slot of the one that computes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qtool-offload")
        for index, block in enumerate(blocks):
            block.module.register_forward_pre_hook(partial(self._enter, index))
            block.module.register_forward_hook(partial(self._leave, index))

    def _enter(self, index: int, *called: Any) -> None:
        """Make the block's sections those in its slot, and let the next one come."""
        if self._here[0] != index:
            if self._coming is None or self._coming[0] != index:
                self._begin(index)  # the first time, or a block out of turn
            assert self._coming is not None
            _, slot, copy = self._coming
            copy.result()
            self._here, self._coming = (index, slot), None
            if self._on_gpu:
                torch.cuda.current_stream(self._device).wait_event(self._sent[slot])
            self._point(index, slot)
        following = (index + 1) % len(self._blocks)
        if following != index:
            self._begin(following)

    def _leave(self, index: int, *called: Any) -> None:
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._used[self._here[1]] = event

    def _begin(self, index: int) -> None:
        """Start to copy a block into the slot that does not compute."""
        if self._coming is not None:
            if self._coming[0] == index:
                return
            self._coming[2].result()  # its slot is written over
        slot = 1 - self._here[1]
        self._coming = (index, slot, self._thread.submit(self._copy, index, slot))

    def _copy(self, index: int, slot: int) -> None:
        self._check_source()
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        if self._stream is not None and self._used[slot] is not None:
            self._stream.wait_event(self._used[slot])
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            start = 0
            for _, section in self._blocks[index].sections:
                part = slice(start, start + len(section))
                if self._on_gpu and not section.is_pinned():
                    section = self._staging[slot][part].copy_(section)
                self._slots[slot][part].copy_(section, non_blocking=True)
                start += align(len(section), ALIGNMENT)
            if self._stream is not None:
                self._sent[slot] = event = torch.cuda.Event()
                event.record(self._stream)

    def _point(self, index: int, slot: int) -> None:
        start = 0
        for module, section in self._blocks[index].sections:
            module.section.data = self._slots[slot][start : start + len(section)]
            start += align(len(section), ALIGNMENT)
