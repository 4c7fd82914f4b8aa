"""Where blocks go: by hand, and against all possible ways."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.block_lists import BlockLists
from formats.errors import KernelError
from formats.placement import Sizes, by_name, on_one, spread, streamed

GPUS = [torch.device("cuda", index) for index in range(4)]
EIGHT = BlockLists(("m.h",), (8,))
sizes_of = st.builds(
    Sizes, st.just(EIGHT), st.integers(0, 30), st.lists(st.integers(1, 20), min_size=1, max_size=8).map(tuple)
)


def test_a_spread_by_hand():
    """Outside 2 and four blocks of 3 over 10 and 10: the first takes two blocks, 8 of 10, the second 6."""
    placement = spread(GPUS[:2], [10, 10], Sizes(BlockLists(("m.h",), (4,)), 2, (3, 3, 3, 3)))
    assert placement.outside == GPUS[0]
    assert placement.blocks == (GPUS[0], GPUS[0], GPUS[1], GPUS[1])
    assert (placement.device_of(None), placement.device_of(3)) == (GPUS[0], GPUS[1])


@given(sizes_of, st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_no_other_way_in_order_leaves_more_room(sizes, free):
    def fullest(split):
        taken = [sum(sizes.blocks[a:b]) for a, b in itertools.pairwise((0, *split, len(sizes.blocks)))]
        taken[0] += sizes.outside
        return max(n / room for n, room in zip(taken, free, strict=True))

    splits = itertools.combinations_with_replacement(range(len(sizes.blocks) + 1), len(free) - 1)
    best = min(map(fullest, splits))
    if best > 1:
        with pytest.raises(KernelError, match=rf"these {len(free)} GPUs have"):
            spread(GPUS[: len(free)], free, sizes)
        return
    blocks = spread(GPUS[: len(free)], free, sizes).blocks
    assert list(blocks) == sorted(blocks, key=lambda device: device.index)
    assert fullest([sum(d.index <= i for d in blocks) for i in range(len(free) - 1)]) <= best + 2e-3


def test_streamed_blocks_lie_evenly_between_those_that_stay():
    """Room for outside 4, five blocks of 10 and two slots: three of eight are streamed."""
    placement = streamed(GPUS[0], 74, Sizes(EIGHT, 4, (10,) * 8))
    assert placement.streamed == {1, 4, 6}
    assert set(placement.blocks) == {GPUS[0]}


@given(sizes_of, st.integers(1, 200))
def test_what_is_on_the_gpu_at_a_time_fits(sizes, free):
    try:
        chosen = streamed(GPUS[0], free, sizes).streamed
    except KernelError:
        assert free < sizes.least
        return
    stays = sum(n for i, n in enumerate(sizes.blocks) if i not in chosen)
    slots = min(2, len(chosen)) * max([sizes.blocks[i] for i in chosen], default=0)
    assert sizes.outside + stays + slots <= free
    assert (not chosen) == (sizes.total <= free)


def test_what_is_not_packed_stays_on_the_gpu():
    """Blocks of 10 packed and 5 dense bytes: beside two slots of 10, all the 40 dense ones."""
    sizes = Sizes(EIGHT, 4, (10,) * 8, (5,) * 8)
    assert (sizes.total, sizes.least) == (124, 4 + 40 + 20)
    assert streamed(GPUS[0], 64, sizes).streamed == set(range(8))
    with pytest.raises(KernelError, match="with all blocks offloaded"):
        streamed(GPUS[0], 63, sizes)


def test_too_small_even_for_two_blocks():
    with pytest.raises(
        KernelError, match=r"^device 'cuda:0': with all blocks offloaded the model takes 24.0 GB, 5.0 GB are free$"
    ):
        streamed(GPUS[0], 5 * 10**9, Sizes(EIGHT, 4 * 10**9, (10 * 10**9,) * 8))


SIZES = Sizes(BlockLists(("model.layers",), (12,)), 1, (1,) * 12)


def test_a_map_by_name():
    placement = by_name({"": 1, "model.layers.1": "cpu", "model.layers.11": 2}, SIZES)
    assert placement.outside == GPUS[1]
    assert placement.blocks == (GPUS[1], torch.device("cpu"), *[GPUS[1]] * 9, GPUS[2])
    assert on_one(GPUS[0], SIZES).devices == {GPUS[0]}


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 0, "model.layers.12": 1}, "device_map: 'model.layers.12' is no block; "
         "blocks are model.layers.0 to model.layers.11, '' all else"),
        ({"model.layers.0": 0}, "device_map: says nothing of ''; add it, or '' for all others"),
        ({"": 0, "x": 1}, "device_map: 'x' is no block; blocks are model.layers.0 to model.layers.11, '' all else"),
    ],
)  # fmt: skip
def test_a_map_that_cannot_be_is_refused(device_map, message):
    with pytest.raises(KernelError) as caught:
        by_name(device_map, SIZES)
    assert str(caught.value) == message
