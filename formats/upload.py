"""From the mapped file to a device, through two pinned buffers: while one is being sent, the other is filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from formats.encoding import align

PIECE_BYTES = 4 << 20
CHUNK_BYTES = 256 << 20
ALIGNMENT = 64  # of sections in the file


class Uploader:
    """Copies tensors of bytes; to a GPU without waiting, ordered before what its current stream is given next."""

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"
        self._buffers = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        self._sent: list[Any] = [None, None]  # events: when a buffer has been read
        self._next = 0

    def put(self, source: Tensor, read: Callable[[int, int], None] = lambda start, stop: None) -> Tensor:
        """source [bytes] u8 on the CPU: the same on the device.

        read: told which bytes have been read and will not be again, so that a mapped file's pages can go.
        """
        target = torch.empty_like(source, device=self._device)
        piece_bytes = len(self._buffers[0])
        pieces = zip(source.split(piece_bytes), target.split(piece_bytes), strict=True)
        for index, (piece, into) in enumerate(pieces):
            buffer = self._free_buffer()[: len(piece)]
            buffer.copy_(piece)
            read(index * piece_bytes, index * piece_bytes + len(piece))
            into.copy_(buffer, non_blocking=True)
            self._record()
        return target

    def _free_buffer(self) -> Tensor:
        if self._sent[self._next] is not None:
            self._sent[self._next].synchronize()
        return self._buffers[self._next]

    def _record(self) -> None:
        if self._on_gpu:
            self._sent[self._next] = event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self._next = 1 - self._next


class HostMemory:
    """Memory for what stays on the host, in chunks: pinned, torch would round each section up to a power of two."""

    def __init__(self, *, pinned: bool, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._pinned, self._chunk_bytes = pinned, chunk_bytes
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, n_bytes: int) -> Tensor:
        """[n_bytes] u8, of any value."""
        room = align(n_bytes, ALIGNMENT)
        if len(self._left) < room:
            chunk_bytes = max(self._chunk_bytes, 1 << (room - 1).bit_length())
            self._left = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        taken, self._left = self._left[:n_bytes], self._left[room:]
        return taken
