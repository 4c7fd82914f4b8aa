"""`qtool warm`: what is tried is kept for the kind of GPU, chosen from then on, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from invoke import refusal

from formats.encoding import Uniform
from formats.kernels.layout import layout_of
from formats.reader import QtmFile
from formats.warm import warm

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'qtool[cuda]'")
from formats.kernels import tuning
from formats.kernels.blocks import DECODED, Blocks, blocks_for

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LAYOUT, _ = layout_of(Uniform(bits=4, group_size=64, symmetric=False), (512, 4096))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU/80 GB")
    forget()
    yield tmp_path / "qtool"
    forget()


def forget():
    tuning.known.cache_clear()
    tuning.choose.cache_clear()


def test_candidates_are_few_smaller_than_the_first_and_all_different():
    for n_tokens in (1, 8, 16, 64):
        first, *others = tuning.candidates(LAYOUT, n_tokens, 512)
        assert first == blocks_for(LAYOUT, n_tokens, 512)
        assert 2 <= len(others) <= 5 and len({first, *others}) == 1 + len(others)
        assert (DECODED in others) == (n_tokens >= 16)
        for blocks in others:
            if blocks == DECODED:
                continue
            assert (blocks.tokens, blocks.warps, blocks.stages) == (first.tokens, first.warps, first.stages)
            assert blocks.outputs <= first.outputs and blocks.inputs <= first.inputs


def test_many_tokens_are_for_cublas_unless_tiles_are_found_faster():
    assert tuning.choose(LAYOUT, 65, 512, GPU) == DECODED  # in the class of 128
    first, tile = tuning.candidates(LAYOUT, 1024, 512)
    assert first == DECODED and tile.is_tile
    assert tuning.candidates(LAYOUT, 16, 512, has_tiles=False) == [DECODED]
    assert tuning.candidates(LAYOUT, 2048, 1 << 20)[0] == DECODED  # whatever the size: a part after the other
    tuning.tune(LAYOUT, 1024, 512, GPU, lambda blocks: 1.0 + (blocks == DECODED))
    assert tuning.choose(LAYOUT, 1000, 512, GPU) == tile


def test_the_fastest_is_chosen_from_then_on_and_in_other_processes(own_cache):
    slow = blocks_for(LAYOUT, 16, 512)
    fast = tuning.candidates(LAYOUT, 16, 512)[-1]
    assert tuning.choose(LAYOUT, 16, 512, GPU) == slow
    best, found = tuning.tune(LAYOUT, 16, 512, GPU, lambda blocks: 1.0 + (blocks != fast))
    assert best == fast and found[slow] == 2.0
    path = tuning.save(GPU)
    forget()
    for n_tokens in (9, 16):  # one class
        assert tuning.choose(LAYOUT, n_tokens, 512, GPU) == fast
    assert tuning.choose(LAYOUT, 17, 512, GPU) == blocks_for(LAYOUT, 17, 512)
    assert tuning.choose(LAYOUT, 16, 256, GPU) == blocks_for(LAYOUT, 16, 256)
    assert path.name.startswith("blocks-Some-GPU-80-GB-triton-")
    assert [each.name for each in own_cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"a": 4}',
        '{"a": {"tokens": 1}}',
        "key:0",
        "key:3",
        'key:"8"',
        "key:true",
        "key:1e9",
        "[" * 10**5,
    ],
)
def test_a_cache_that_cannot_be_is_as_none(own_cache, content):
    key = tuning.class_key(LAYOUT, 1, 512)
    if content.startswith("key:"):
        blocks = dataclasses.asdict(blocks_for(LAYOUT, 1, 512)) | {"outputs": json.loads(content[4:])}
        content = json.dumps({key: blocks})
    own_cache.mkdir()
    tuning.cache_file(GPU).write_text(content)
    assert tuning.choose(LAYOUT, 1, 512, GPU) == blocks_for(LAYOUT, 1, 512)


def test_a_value_of_another_type_is_never_launched_with(own_cache):
    """64.0 equals 64, and is no size of a block."""
    fast = tuning.candidates(LAYOUT, 1, 512)[1]
    own_cache.mkdir()
    rows = {tuning.class_key(LAYOUT, 1, 512): {k: float(v) for k, v in dataclasses.asdict(fast).items()}}
    tuning.cache_file(GPU).write_text(json.dumps(rows))
    found = tuning.choose(LAYOUT, 1, 512, GPU)
    assert found == fast and all(type(value) is int for value in dataclasses.asdict(found).values())


def test_new_timings_are_chosen_though_the_device_has_another_name(own_cache):
    fast = tuning.candidates(LAYOUT, 16, 512)[-1]
    tuning.choose(LAYOUT, 16, 512, GPU)
    tuning.tune(LAYOUT, 16, 512, torch.device("cuda"), lambda blocks: 1.0 + (blocks != fast))
    assert tuning.choose(LAYOUT, 16, 512, GPU) == fast


def test_a_user_without_a_home_has_no_timings(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    assert tuning.choose(LAYOUT, 1, 512, GPU) == blocks_for(LAYOUT, 1, 512)


def test_a_file_is_warmed_kind_by_kind(tiny_files, own_cache):
    """On the CPU, interpreted; the second candidate is always the fastest."""
    calls = []

    def time(run):
        assert run().shape[0] == tokens
        calls.append(run)
        return 2.0 if len(calls) == 1 else 1.0 / len(calls)

    tokens = 1
    with QtmFile.open(tiny_files.compressed("llama")) as file:
        rows = list(warm(file, CPU, [1], time))
    assert {row.shape for row in rows} == {(260, 32), (32, 32), (16, 32), (80, 32), (32, 80)}
    assert all(row.tokens == 1 and row.milliseconds <= row.untried_milliseconds for row in rows)
    stored = json.loads(tuning.cache_file(CPU).read_text())
    assert len(stored) == len(rows)
    assert Blocks(**rows[0].blocks) in [Blocks(**blocks) for blocks in stored.values()]


@pytest.mark.parametrize("tokens", ["0", "a", "1,,2", "-1", "100000"])
def test_tokens_that_cannot_be(tiny_files, tokens):
    message = f"--tokens {tokens}: must be numbers from 1 to 65536, as 1,16,512"
    assert refusal("warm", tiny_files.compressed("llama"), "--tokens", tokens) == message


def test_without_a_gpu_there_is_nothing_to_warm(tiny_files):
    message = "device 'cuda': torch finds no GPU here; use cpu, or a torch that is built for CUDA"
    assert refusal("warm", tiny_files.compressed("llama")) == message
    message = "device 'cpu': has no kernels to make ready; give a GPU, as cuda"
    assert refusal("warm", tiny_files.compressed("llama"), "--device", "cpu") == message
