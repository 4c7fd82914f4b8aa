"""Which block of a model goes where: decided from sizes alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from formats.errors import KernelError
from formats.header import TensorEntry
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

    block_list: str  # the name of the module list
    outside: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, file: QtmFile) -> Sizes:
        block_list, outside, blocks = str(file.header.model.get("blocks")), 0, dict[int, int]()
        for entry in file.tensors.values():
            if (block := block_of(entry, block_list)) is None:
                outside += entry.n_bytes
            else:
                blocks[block] = blocks.get(block, 0) + entry.n_bytes
        return cls(block_list, outside, tuple(blocks.get(index, 0) for index in range(max(blocks, default=-1) + 1)))

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks)


def block_of(entry: TensorEntry, block_list: str) -> int | None:
    """The index of the block that a tensor is in."""
    inside = entry.name.removeprefix(f"{block_list}.")
    index = inside.partition(".")[0]
    return int(index) if inside != entry.name and index.isdecimal() and len(index) < 6 else None


def on_one(device: torch.device, sizes: Sizes) -> Placement:
    return Placement(device, (device,) * len(sizes.blocks))


def spread(devices: Sequence[torch.device], free: Sequence[int], sizes: Sizes) -> Placement:
    """Blocks in their order over several devices, so that the fullest has the least share of its free bytes taken.

    What is outside of the blocks is on the first device. KernelError where it is too much for all together.
    """
    low, high = 0.0, 1.0
    if (found := _filled(free, sizes, high)) is None:
        need, have = (f"{value / 1e9:.1f} GB" for value in (sizes.total, sum(free)))
        raise KernelError(f"device_map 'auto': the model takes {need}, these {len(devices)} GPUs have {have} free")
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


def by_name(device_map: DeviceMap, sizes: Sizes, default: str = "") -> Placement:
    """As a map from names of modules to devices says: the longest that a name begins with; "" is for all others."""

    def device(name: str) -> torch.device:
        found = [key for key in device_map if key == default or name == key or name.startswith(f"{key}.")]
        if not found:
            raise KernelError(f"device_map: says nothing of {name!r}; add it, or '' for all others")
        value = device_map[max(found, key=len)]
        return torch.device(f"cuda:{value}" if isinstance(value, int) else value)

    names = [f"{sizes.block_list}.{index}" for index in range(len(sizes.blocks))]
    unknown = [key for key in device_map if key != default and key not in names]
    if unknown:
        raise KernelError(f"device_map: {unknown[0]!r} is no block; blocks are {names[0]} to {names[-1]}, '' all else")
    return Placement(device(default), tuple(device(name) for name in names))


def streamed(device: torch.device, free: int, sizes: Sizes) -> Placement:
    """One GPU that holds as many blocks as it has room for; the others, evenly between them, are streamed.

    Evenly, since while a block that stays computes, the next one that does not is copied. KernelError where not even
    SLOTS blocks fit beside what is outside of them.
    """
    n = len(sizes.blocks)
    for n_streamed in range(n + 1):
        chosen = frozenset((2 * i + 1) * n // (2 * n_streamed) for i in range(n_streamed))
        slots = min(SLOTS, n_streamed) * max((sizes.blocks[i] for i in chosen), default=0)
        resident = sum(n_bytes for i, n_bytes in enumerate(sizes.blocks) if i not in chosen)
        if sizes.outside + resident + slots <= free:
            return Placement(device, (device,) * n, chosen)
    need, have = (f"{value / 1e9:.1f} GB" for value in (least_streamed(sizes), free))
    raise KernelError(f"device '{device}': with all blocks offloaded the model takes {need}, {have} are free")


def least_streamed(sizes: Sizes) -> int:
    """Bytes of a GPU that streams all blocks."""
    return sizes.outside + min(SLOTS, len(sizes.blocks)) * max(sizes.blocks, default=0)
