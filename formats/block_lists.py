"""Which block of a model a tensor is in: blocks are the items of module lists, numbered through as they are run.

A decoder has one list, an encoder-decoder two. The header has its name as `model.blocks`, or both in a list (SPEC 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_LISTS = 2


@dataclass(frozen=True, slots=True)
class BlockLists:
    """Names of module lists, and how many blocks each has."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, model: Mapping[str, Any], tensors: Iterable[str]) -> BlockLists:
        """From a header's `model`, which can say anything there, and the names of the file's tensors."""
        names, tensors = list_names(model), list(tensors)
        numbers = [[n for tensor in tensors if (n := _number(tensor, name)) is not None] for name in names]
        return cls(names, tuple(max(of_one, default=-1) + 1 for of_one in numbers))

    def number(self, tensor: str) -> int | None:
        """Of the block that has the tensor of this name; None if none has."""
        before = 0
        for name, length in zip(self.names, self.lengths, strict=True):
            number = _number(tensor, name)
            if number is not None and number < length:
                return before + number
            before += length
        return None

    def name(self, number: int) -> str:
        """The name of a block's module."""
        for name, length in zip(self.names, self.lengths, strict=True):
            if number < length:
                return f"{name}.{number}"
            number -= length
        raise IndexError(number)

    def to_header(self) -> str | list[str]:
        """As `list_names` finds them."""
        return self.names[0] if len(self.names) == 1 else list(self.names)

    def inside(self, tensor: str) -> str:
        """The name of a block's tensor within the block."""
        number = self.number(tensor)
        return tensor if number is None else tensor.removeprefix(f"{self.name(number)}.")


def list_names(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of module lists in a header's `model`."""
    named = model.get("blocks")
    if isinstance(named, list) and len(named) <= MAX_LISTS and all(isinstance(name, str) for name in named):
        return tuple(named)
    return (str(named),)


def _number(tensor: str, block_list: str) -> int | None:
    inside = tensor.removeprefix(f"{block_list}.")
    index = inside.partition(".")[0]
    return int(index) if inside != tensor and index.isdecimal() and len(index) < 6 else None
