"""What the GPU kernels read of a section, counted load by load by the interpreter: memory is what a few tokens cost."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from layer_samples import make_trellis, with_outliers
from test_kernels_triton import ENCODINGS

from formats.encoding import INPUT_SCALES, encoding_of
from formats.kernels.blocks import blocks_for, tile_for
from formats.kernels.layout import layout_of
from formats.section import pack

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'qtool[cuda]'")
from triton.runtime import interpreter

from formats.kernels import triton_launch as kernels

pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="only the interpreter can be asked")

SHAPE = (40, 1100)  # several programs, and splits whose last block ends short
ABOVE_THE_FLOOR = 1.05
PLANES = ("codes", "path")
NAMES = (
    *(f"uniform {bits} bits" for bits in range(2, 9)), "two levels 3 bits", "nf4, double quantization", "fitted 3 bits",
    "int8 with columns", "outliers",
)  # fmt: skip


class Reads:
    """Of every byte of a section: how often it was read, and by how many programs."""

    def __init__(self, section: torch.Tensor) -> None:
        self._first, self.times = section.data_ptr(), np.zeros(len(section), np.int64)
        self._by_program: dict[object, np.ndarray] = {}

    def add(self, program: object, addresses: np.ndarray, width: int) -> None:
        at = (addresses.astype(np.int64) - self._first)[:, None] + np.arange(width)
        at = at[(at >= 0) & (at < len(self.times))]
        np.add.at(self.times, at, 1)
        self._by_program.setdefault(program, np.zeros(len(self.times), bool))[at] = True

    @property
    def programs(self) -> np.ndarray:
        return np.sum(list(self._by_program.values()), axis=0)


@pytest.fixture
def reads_of(monkeypatch):
    """Multiplies, and says what was read of the section: (layer, n_tokens, has_tiles, blocks) -> (parts, reads)."""

    def multiply(layer, n_tokens, has_tiles=True, blocks=None):
        section, encoding = torch.frombuffer(bytearray(pack(layer)), dtype=torch.uint8), encoding_of(layer)
        reads, builder = Reads(section), interpreter.interpreter_builder
        load = type(builder).create_masked_load

        def counted(self, ptrs, mask, *others):
            width = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
            reads.add(self.grid_idx, ptrs.data[mask.data.astype(bool)], width)
            return load(self, ptrs, mask, *others)

        with monkeypatch.context() as patched:
            patched.setattr(type(builder), "create_masked_load", counted)
            patched.setattr(kernels, "has_tiles", lambda dtype: has_tiles)
            x = torch.ones((n_tokens, layer.in_features), dtype=torch.float16)
            kernels.multiply_with(x, section, encoding, layer.shape, blocks)
        return encoding.parts(layer.shape), reads

    return multiply


def of(part, counts):
    return counts[part.offset_bytes : part.end_bytes]


CASES = [
    *((name, n_tokens, True, 1) for name in NAMES for n_tokens in (1, 16)),
    *((name, 8, False, 1) for name in NAMES[::3]),
    *(
        (name, 130, True, times)
        for name, times in (("uniform 4 bits", 3), ("uniform 3 bits", 2), ("int8 with columns", 2))
    ),
]


@pytest.mark.parametrize(("name", "n_tokens", "has_tiles", "times"), CASES)
def test_every_byte_of_codes_is_read_once_by_a_block_of_tokens(reads_of, name, n_tokens, has_tiles, times):
    layer = ENCODINGS[name](*SHAPE)
    layout = layout_of(encoding_of(layer), SHAPE)[0]
    blocks = tile_for(layout, n_tokens, SHAPE[0]) if n_tokens > 128 else None
    assert (blocks or blocks_for(layout, n_tokens, SHAPE[0], has_tiles)).splits > 1
    parts, reads = reads_of(layer, n_tokens, has_tiles, blocks)
    planes = [part for part in parts if part.name.startswith(PLANES)]
    assert planes
    for part in planes:
        assert (of(part, reads.times) == times).all(), part.name


@pytest.mark.parametrize("name", NAMES)
def test_what_programs_read_is_at_most_five_percent_above_what_there_is(reads_of, name):
    """One token. What belongs to inputs, as activations do, is read by every program, from the cache."""
    layer = ENCODINGS[name](*SHAPE)
    parts, reads = reads_of(layer, 1)
    of_outputs = [part for part in parts if part.name not in (INPUT_SCALES, "columns", "levels", "absmax_mean")]
    read = sum(int(of(part, reads.programs).sum()) for part in of_outputs)
    there = sum(part.end_bytes - part.offset_bytes for part in of_outputs)
    assert 0.9 * there <= read <= ABOVE_THE_FLOOR * there


def test_a_trellis_reads_a_word_of_its_path_twice_at_most(reads_of):
    """Once for its own outputs, and once for those that it goes on to."""
    parts, reads = reads_of(with_outliers(make_trellis(*SHAPE, 3, 64, memory=7), every=50), 1)
    path, *upper = [part for part in parts if part.name.startswith(PLANES)]
    assert of(path, reads.times).max() <= 2
    assert upper and all((of(part, reads.times) == 1).all() for part in upper)
