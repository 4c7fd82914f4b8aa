"""Which block a tensor is in."""

from __future__ import annotations

import pytest

from formats.block_lists import BlockLists, list_names

TENSORS = ["shared.w", "encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "decoder.block.2.x.3.w"]


def test_blocks_of_two_lists_are_numbered_through():
    lists = BlockLists.of({"blocks": ["encoder.block", "decoder.block"]}, TENSORS)
    assert lists == BlockLists(("encoder.block", "decoder.block"), (2, 3))
    assert [lists.number(name) for name in TENSORS] == [None, 0, 1, 2, 4]
    assert [lists.name(number) for number in (0, 1, 2, 4)] == [f"encoder.block.{n}" for n in (0, 1)] + [
        f"decoder.block.{n}" for n in (0, 2)
    ]
    assert [lists.inside(name) for name in TENSORS] == ["shared.w", "w", "w", "w", "x.3.w"]
    with pytest.raises(IndexError):
        lists.name(5)


def test_one_list_is_told_by_its_name_alone():
    lists = BlockLists.of({"blocks": "h"}, ["h.0.w", "h.1.w", "h.x.w", "h.100000.w", "hh.2.w"])
    assert lists == BlockLists(("h",), (2,)) and lists.to_header() == "h"
    assert BlockLists(("a", "b"), (1, 1)).to_header() == ["a", "b"]


@pytest.mark.parametrize("blocks", [None, 3, {}, [1, 2], ["a", "b", "c"], ["a", None], [["a"]]])
def test_a_header_can_say_anything(blocks):
    """What is not understood names no tensor's block."""
    assert len(list_names({"blocks": blocks})) == 1
    assert BlockLists.of({"blocks": blocks}, TENSORS).lengths == (0,)
    assert BlockLists.of({"blocks": []}, TENSORS) == BlockLists((), ())
