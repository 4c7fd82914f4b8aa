"""Blocks that are on a GPU only while they compute (FlexGen, arXiv 2303.06865): the next one is copied meanwhile.

Two slots on the GPU hold a block's sections each. A thread copies from the mapped file to pinned memory and starts
the transfer on a stream of its own; events order it with the kernels, so the host never waits for those. On a CPU the
same steps are taken in order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from formats.encoding import align
from formats.errors import KernelError
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


@dataclass(eq=False)
class _Slot:
    """Room for one block. The events are None on a CPU, and before they are first recorded."""

    memory: Tensor
    staging: Tensor | None  # pinned, for sections that are not
    arrived: Any = None  # what was copied is there, and staging can be filled again
    read: Any = None  # the kernels that read it are done


@dataclass(frozen=True, slots=True)
class _Copy:
    """A block on its way."""

    block: int
    slot: int
    done: Future[None]


class BlockStreamer:
    """Hooks on blocks, in the order in which the model runs them.

    The blocks hold it, and it does not hold them: a model is freed, with what it has on the GPU, when it is let go.
    """

    def __init__(
        self, blocks: Sequence[StreamedBlock], device: torch.device, check_source: Callable[[], None] = lambda: None
    ) -> None:
        """check_source: raises when the sections are no longer what they were; called before each copy."""
        self._sections = [[(weakref.ref(module), section) for module, section in block.sections] for block in blocks]
        self._device, self._check_source = device, check_source
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slots = [self._slot(max(block.n_bytes for block in blocks)) for _ in range(2)]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # who had the slots' memory may still read it
        self._block, self._at = -1, 1  # the one that computes, and its slot
        self._coming: _Copy | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="qtool-offload")
        for index, block in enumerate(blocks):
            block.module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
            block.module.register_forward_hook(self._leave)

    def _slot(self, n_bytes: int) -> _Slot:
        memory = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        if self._stream is None:
            return _Slot(memory, None)
        memory.record_stream(self._stream)
        if all(section.is_pinned() for sections in self._sections for _, section in sections):
            return _Slot(memory, None)
        return _Slot(memory, torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True))

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the block's sections those in its slot, and let the next one come."""
        _refuse_gradients((*args, *kwargs.values()))
        if self._block != index:
            if self._coming is None or self._coming.block != index:
                self._begin(index)  # the first time, or a block out of turn
            self._arrive()
        following = (index + 1) % len(self._sections)
        if following != index:
            self._begin(following)

    def _leave(self, module: nn.Module, *called: Any) -> None:
        if self._stream is not None:
            self._slots[self._at].read = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))

    def _begin(self, index: int) -> None:
        """Start to copy a block into the slot that does not compute."""
        if self._coming is not None:
            if self._coming.block == index:
                return
            coming, self._coming = self._coming, None
            coming.done.result()  # its slot is written over
        slot = 1 - self._at
        self._coming = _Copy(index, slot, self._thread.submit(self._copy, index, slot))

    def _arrive(self) -> None:
        """Wait for the block that comes, and let its modules read its slot."""
        coming, self._coming = self._coming, None
        assert coming is not None
        coming.done.result()
        slot = self._slots[coming.slot]
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.arrived)
        self._block, self._at = coming.block, coming.slot
        start = 0
        for reference, section in self._sections[coming.block]:
            if (module := reference()) is not None:
                module.section.data = slot.memory[start : start + len(section)]
            start += align(len(section), ALIGNMENT)

    def _copy(self, index: int, at: int) -> None:
        self._check_source()
        slot = self._slots[at]
        if slot.arrived is not None:
            slot.arrived.synchronize()
        if self._stream is not None and slot.read is not None:
            self._stream.wait_event(slot.read)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            start = 0
            for _, section in self._sections[index]:
                part = slice(start, start + len(section))
                if slot.staging is not None and not section.is_pinned():
                    section = slot.staging[part].copy_(section)
                slot.memory[part].copy_(section, non_blocking=True)
                start += align(len(section), ALIGNMENT)
            if self._stream is not None:
                slot.arrived = event = torch.cuda.Event()
                event.record(self._stream)


def _refuse_gradients(inputs: tuple[Any, ...]) -> None:
    """A way back would read the slots again, when they hold other blocks."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        raise KernelError("offload: blocks that are streamed have no gradients; load the model without it")
