"""Whole models on a GPU, against the CPU: skipped without one. `make test-gpu` runs this and the kernels' own tests."""

from __future__ import annotations

import os

import pytest
import torch
from invoke import qtool_json
from tiny import PACKED_KINDS
from transformers import AutoModelForCausalLM

import qtool
from formats.build import build_model
from formats.kv_cache import PackedCache
from formats.modules import QuantLinear
from formats.placement import Placement, Sizes
from formats.reader import QtmFile

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'qtool[cuda]'")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted here"),
]
IDS = torch.arange(48).view(2, 24) * 5 % 250


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids.to(model.device)).logits.float().cpu()


def apart(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("family", "options"), PACKED_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_gives_what_the_cpu_gives(tiny_files, family, options, dtype):
    path = tiny_files.compressed(family, *options)
    model = qtool.load(path, device="cuda", dtype=dtype)
    within = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for ids in (IDS[:1, :4], IDS):  # rows, and tiles
        assert apart(logits(model, ids), logits(qtool.load(path), ids)) <= within


@pytest.mark.parametrize(("family", "options"), PACKED_KINDS[:2])
def test_an_exported_folder_gives_what_the_file_gives(tiny_files, tmp_path, family, options):
    path = tiny_files.compressed(family, *options)
    qtool_json("export", path, "--to", "transformers", "-o", tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float16).eval().to("cuda")
    want = qtool.load(path, device="cuda", dtype=torch.float16)
    assert torch.equal(logits(model), logits(want))


def test_no_layer_waits_for_the_gpu(tiny_files):
    """What would, is an error to torch then."""
    model = qtool.load(tiny_files.compressed("llama", *dict(PACKED_KINDS)["llama"]), device="cuda")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    inputs = [[torch.ones(n, layer.in_features, device="cuda") for n in (1, 8, 64)] for layer in layers]
    for layer, each in zip(layers, inputs, strict=True):
        for x in each:
            layer(x.half())  # compiled, and its tables made
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer, each in zip(layers, inputs, strict=True):
            for x in each:
                layer(x.half())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generation_is_deterministic(tiny_files):
    model = qtool.load(tiny_files.compressed("llama", *dict(PACKED_KINDS)["llama"]), device="cuda")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    first, second = (model.generate(IDS[:1].cuda(), **options) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("in_host_memory", [True, False])
def test_streamed_blocks_give_what_resident_ones_give(tiny_files, in_host_memory):
    path, gpu = tiny_files.compressed("llama"), torch.device("cuda", 0)
    want = qtool.load(path, device="cuda:0", dtype=torch.float16)
    file = QtmFile.open(path)
    placement = Placement(gpu, (gpu,) * 3, frozenset({0, 1, 2}))
    model = build_model(file, Sizes.of(file), placement, torch.float16, in_host_memory=in_host_memory)
    for ids in (IDS, IDS[:1], IDS + 1):
        assert torch.equal(logits(model, ids), logits(want, ids))


def test_blocks_on_the_gpu_and_on_the_cpu(tiny_files):
    path = tiny_files.compressed("llama")
    model = qtool.load(path, device_map={"": 0, "model.layers.1": "cpu"}, dtype=torch.float32)
    assert apart(logits(model), logits(qtool.load(path))) <= 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_cache_gives_what_it_gives_on_the_cpu(tiny_files, bits):
    path, found = tiny_files.compressed("llama"), []
    for device in ("cuda", "cpu"):
        model = qtool.load(path, device=device, dtype=torch.float32)
        with torch.no_grad():
            out = model(IDS.to(device), cache=PackedCache(model.config, bits))
        found.append(out.logits.cpu())
    assert apart(*found) <= 1e-2  # a key on the edge of two codes may fall to either


def test_a_forward_is_captured_in_a_cuda_graph(tiny_files):
    model = qtool.load(tiny_files.compressed("llama"), device="cuda", dtype=torch.float16)
    ids = IDS[:1].cuda()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids, use_cache=False).logits
        graph.replay()
    assert torch.equal(out, want)


def test_what_is_warmed_is_chosen(tiny_files, tmp_path, monkeypatch):
    from formats.kernels import tuning
    from formats.warm import warm

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.known.cache_clear()
    with QtmFile.open(tiny_files.compressed("llama")) as file:
        rows = list(warm(file, torch.device("cuda", 0), [1, 16]))
    assert rows and all(0 < row.milliseconds <= row.untried_milliseconds for row in rows)
    assert len(list((tmp_path / "qtool").iterdir())) == 1
    tuning.known.cache_clear()
    tuning.choose.cache_clear()
