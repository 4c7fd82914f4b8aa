"""Which block of a model goes where: decided from sizes alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from formats.block_lists import BlockLists
from formats.encoding import MatrixEncoding
from formats.errors import KernelError
from formats.reader import QtmFile

DeviceMap = Mapping[str, int | str]
SLOTS = 2
"""Blocks that are on a GPU at a time of those that are streamed to it: one computes, the next one is copied."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A device for what is outside of the blocks and for each block, and which blocks come only when they compute."""

    outside: torch.device
    blocks: tuple[torch.device, ...]
    streamed: frozenset[int] = frozenset()

    def device_of(self, block: int | None) -> torch.device:
        return self.outside if block is None else self.blocks[block]

    @property
    def devices(self) -> set[torch.device]:
        return {self.outside, *self.blocks}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a file's tensors, by where they belong."""

    lists: BlockLists
    outside: int
    packed: tuple[int, ...]  # of each block: what can be streamed
    dense: tuple[int, ...] = ()  # of each block: what stays; none if left out

    @classmethod
    def of(cls, file: QtmFile) -> Sizes:
        lists, outside = BlockLists.of(file.header.model, file.tensors), 0
        packed, dense = dict[int, int](), dict[int, int]()
        for entry in file.tensors.values():
            if (block := lists.number(entry.name)) is None:
                outside += entry.n_bytes
            else:
                kind = packed if isinstance(entry.encoding, MatrixEncoding) else dense
                kind[block] = kind.get(block, 0) + entry.n_bytes
        numbers = range(sum(lists.lengths))
        return cls(lists, outside, tuple(packed.get(i, 0) for i in numbers), tuple(dense.get(i, 0) for i in numbers))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Each block's bytes."""
        dense = self.dense or (0,) * len(self.packed)
        return tuple(a + b for a, b in zip(self.packed, dense, strict=True))

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks)

    def streaming(self, chosen: frozenset[int]) -> int:
        """Bytes on a GPU at most, while the chosen blocks are streamed."""
        slots = min(SLOTS, len(chosen)) * max((self.packed[i] for i in chosen), default=0)
        return self.total - sum(self.packed[i] for i in chosen) + slots

    @property
    def least(self) -> int:
        """Bytes of a GPU that streams all blocks."""
        return self.streaming(frozenset(range(len(self.packed))))


def on_one(device: torch.device, sizes: Sizes) -> Placement:
    return Placement(device, (device,) * len(sizes.packed))


def spread(devices: Sequence[torch.device], free: Sequence[int], sizes: Sizes) -> Placement:
    """Blocks in their order over several devices, so that the fullest has the least share of its free bytes taken.

    What is outside of the blocks is on the first device. KernelError where it is too much for all together.
    """
    low, high = 0.0, 1.0
    if (found := _filled(free, sizes, high)) is None:
        need, have = (f"{value / 1e9:.1f} GB" for value in (sizes.total, sum(free)))
        raise KernelError(
            f"device_map 'auto': the model takes {need}, these {len(devices)} GPUs have {have} free; "
            "--device cuda --offload disk would do"
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        trial = _filled(free, sizes, middle)
        low, high, found = (middle, high, found) if trial is None else (low, middle, trial)
    return Placement(devices[0], tuple(devices[index] for index in found))


def _filled(free: Sequence[int], sizes: Sizes, share: float) -> list[int] | None:
    """The device of each block, each filled up to `share` before the next; None where that is not enough."""
    room, at, found = [share * n for n in free], 0, list[int]()
    room[0] -= sizes.outside
    for n_bytes in sizes.blocks:
        while at < len(room) and room[at] < n_bytes:
            at += 1
        if at == len(room):
            return None
        room[at] -= n_bytes
        found.append(at)
    return found if room[0] >= 0 else None


def by_name(device_map: DeviceMap, sizes: Sizes) -> Placement:
    """As a map from names of blocks to devices says; "" is for all others, and for what is outside of the blocks."""
    names = [sizes.lists.name(index) for index in range(len(sizes.packed))]
    unknown = [key for key in device_map if key and key not in names]
    if unknown:
        blocks = f"blocks are {names[0]} to {names[-1]}, '' all else" if names else "the file names none, give ''"
        raise KernelError(f"device_map: {unknown[0]!r} is no block; {blocks}")
    missing = [name for name in ("", *names) if name not in device_map and "" not in device_map]
    if missing:
        raise KernelError(f"device_map: says nothing of {missing[0]!r}; add it, or '' for all others")
    values = (device_map.get(name, device_map.get("", "")) for name in ("", *names))
    outside, *blocks_at = (torch.device(f"cuda:{value}" if isinstance(value, int) else value) for value in values)
    return Placement(outside, tuple(blocks_at))


def streamed(device: torch.device, free: int, sizes: Sizes) -> Placement:
    """One GPU that holds as many blocks as it has room for; the others, evenly between them, are streamed.

    Evenly, since while a block that stays computes, the next one that does not is copied. KernelError where not even
    SLOTS blocks fit beside what stays.
    """
    n = len(sizes.packed)
    for n_streamed in range(n + 1):
        chosen = frozenset((2 * i + 1) * n // (2 * n_streamed) for i in range(n_streamed))
        if sizes.streaming(chosen) <= free:
            return Placement(device, (device,) * n, chosen)
    need, have = (f"{value / 1e9:.1f} GB" for value in (sizes.least, free))
    raise KernelError(f"device '{device}': with all blocks offloaded the model takes {need}, {have} are free")
