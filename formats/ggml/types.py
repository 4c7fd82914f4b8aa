"""The block types of ggml: what a block holds, and the numbers by which files name them."""

from __future__ import annotations

from dataclasses import dataclass

from formats.errors import FormatError

BLOCK = 32
"""Weights of a block of the older types, which share one scale."""
SUPER_BLOCK = 256
"""Weights of a block of the K types, whose scales are themselves quantized."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of tensor. file_type: what `general.file_type` says of a file that is mostly of it."""

    name: str
    id: int
    weights: int  # of a block
    n_bytes: int  # of a block
    file_type: int
    fallback: str = ""  # for rows that are no whole super-blocks, as llama.cpp falls back

    def row_bytes(self, n_inputs: int) -> int:
        """Bytes of a row; FormatError unless it is whole blocks."""
        if n_inputs % self.weights:
            raise FormatError(f"rows of {n_inputs}: no whole blocks of {self.weights}, which {self.name} needs")
        return n_inputs // self.weights * self.n_bytes


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, 0),
        BlockType("F16", 1, 1, 2, 1),
        BlockType("BF16", 30, 1, 2, 32),
        BlockType("Q4_0", 2, BLOCK, 18, 2),
        BlockType("Q4_1", 3, BLOCK, 20, 3),
        BlockType("Q5_0", 6, BLOCK, 22, 8),
        BlockType("Q5_1", 7, BLOCK, 24, 9),
        BlockType("Q8_0", 8, BLOCK, 34, 7),
        BlockType("IQ4_NL", 20, BLOCK, 18, 25),
        BlockType("Q2_K", 10, SUPER_BLOCK, 84, 10, "Q4_0"),
        BlockType("Q3_K", 11, SUPER_BLOCK, 110, 12, "Q4_0"),
        BlockType("Q4_K", 12, SUPER_BLOCK, 144, 15, "Q5_0"),
        BlockType("Q5_K", 13, SUPER_BLOCK, 176, 17, "Q5_1"),
        BlockType("Q6_K", 14, SUPER_BLOCK, 210, 18, "Q8_0"),
    )
}


@dataclass(frozen=True, slots=True)
class KForm:
    """bits: of a code. group: weights that share a scale. stat_bits: of a scale or minimum. has_min: else, signs."""

    bits: int
    group: int
    stat_bits: int
    has_min: bool

    @property
    def n_groups(self) -> int:
        return SUPER_BLOCK // self.group

    @property
    def offset(self) -> int:
        """What a code is less by in the weight."""
        return 0 if self.has_min else 1 << (self.bits - 1)


K_FORMS = {
    "Q2_K": KForm(2, 16, 4, True),
    "Q3_K": KForm(3, 16, 6, False),
    "Q4_K": KForm(4, 32, 6, True),
    "Q5_K": KForm(5, 32, 6, True),
    "Q6_K": KForm(6, 16, 8, False),
}


def fallback(kind: str, n_inputs: int) -> str | None:
    """The type that rows have which are no whole blocks of this one, as llama.cpp falls back; None where none has."""
    found = TYPES[kind]
    while n_inputs % found.weights:
        if not found.fallback:
            return None
        found = TYPES[found.fallback]
    return found.name
