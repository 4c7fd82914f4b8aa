"""A file on a GPU: what is missing is said in one line; the GPU's kernels run whole models, here interpreted."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from invoke import refusal, run_qtool

import formats.device
import qtool
from formats.errors import KernelError
from formats.kernels import registry
from formats.placement import Sizes
from formats.reader import QtmFile


@pytest.fixture
def on_gpu_kernels(monkeypatch):
    """Models on the CPU run by the GPU's kernels, interpreted."""
    pytest.importorskip("triton", reason="the GPU kernels need triton: pip install 'qtool[cuda]'")
    registry.load_kernels.cache_clear()
    monkeypatch.setitem(registry.MODULES, "cpu", registry.MODULES["cuda"])
    yield
    registry.load_kernels.cache_clear()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ("--bits", "3", "--outliers", "1%")),
        ("gpt2", ("--format", "nf4", "--double-quant", "--group-size", "64")),
        ("gemma2", ("--format", "fitted", "--bits", "3")),
        ("qwen2", ("--format", "trellis", "--bits", "2")),
        ("llama", ("--method", "spqr", "--bits", "4")),
    ],
)
def test_a_model_by_gpu_kernels_has_the_logits_that_the_cpu_gives(request, tiny_files, family, options):
    model = qtool.load(tiny_files.compressed(family, *options))
    ids = torch.arange(24).view(2, 12) % 250
    with torch.no_grad():
        want = model(ids).logits
        request.getfixturevalue("on_gpu_kernels")
        few, many = model(ids[:1, :5]).logits, model(ids).logits  # rows, and tiles
    assert (few - want[:1, :5]).abs().max() <= 1e-4 * want.abs().max()
    assert (many - want).abs().max() <= 1e-4 * want.abs().max()


def test_another_dtype_is_that_of_all_that_is_not_packed(tiny_files):
    path = tiny_files.compressed("llama")
    model, half = qtool.load(path), qtool.load(path, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16, torch.uint8}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        want, got = model(ids).logits, half(ids).logits
    assert got.dtype == torch.float16
    assert (got.float() - want).abs().max() <= 0.02 * want.abs().max()


def test_a_tied_embedding_is_in_memory_once(tiny_files):
    model = qtool.load(tiny_files.compressed("llama"))
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.section.data_ptr() == embedding.packed.section.data_ptr()


def found_gpu(monkeypatch, n=1, capability=(8, 0), free=10**12):
    """What `ready_device` alone sees: torch itself goes on without a GPU."""
    cuda = SimpleNamespace(
        device_count=lambda: n,
        get_device_capability=lambda device: capability,
        get_device_name=lambda device: "a GPU",
        mem_get_info=lambda device: (free, free),
    )
    monkeypatch.setattr(formats.device, "torch", SimpleNamespace(device=torch.device, cuda=cuda))


@pytest.mark.parametrize(
    ("device", "gpu", "message"),
    [
        ("gpu", {}, "device 'gpu': torch knows no such device; use cpu or cuda"),
        ("cuda", {"n": 0}, "device 'cuda': torch finds no GPU here; use cpu, or a torch that is built for CUDA"),
        ("mps", {}, "device 'mps': there are no kernels for it; use cpu or cuda"),
        ("cuda:3", {}, "device 'cuda:3': the last GPU here is cuda:0"),
        (
            "cuda",
            {"capability": (6, 1)},
            "device 'cuda': a GPU has compute capability 6.1, must be 7.5 or more; use cpu",
        ),
        ("cuda", {"free": 10}, "device 'cuda': the model takes 0.0 GB, a GPU has 0.0 GB free; use cpu, or fewer bits"),
    ],
)
def test_a_device_that_cannot_run_a_file_is_refused_at_once(monkeypatch, tiny_files, device, gpu, message):
    found_gpu(monkeypatch, **gpu)
    command = ["generate", tiny_files.compressed("llama"), "--prompt", "the", "--device", device]
    assert refusal(*command) == message


@pytest.mark.parametrize(("available", "way_out"), [(10**12, "host"), (1, "disk")])
def test_a_model_larger_than_the_gpu_is_told_what_would_do(monkeypatch, tiny_files, available, way_out):
    """Room for two of three blocks, so that the third can be streamed; from the host's memory if it is free."""
    pytest.importorskip("triton")
    path = tiny_files.compressed("llama")
    with QtmFile.open(path) as file:
        sizes = Sizes.of(file)
    found_gpu(monkeypatch, free=sizes.total - 1)
    monkeypatch.setattr(formats.device, "available_bytes", lambda: available)
    message = refusal("generate", path, "--prompt", "the", "--device", "cuda")
    assert message == (f"device 'cuda': the model takes 0.0 GB, a GPU has 0.0 GB free; --offload {way_out} would do")


def test_blocks_that_the_host_has_no_room_for_are_refused(monkeypatch, tiny_files):
    pytest.importorskip("triton")
    path = tiny_files.compressed("llama")
    with QtmFile.open(path) as file:
        found_gpu(monkeypatch, free=Sizes.of(file).total - 1)
    monkeypatch.setattr(formats.device, "available_bytes", lambda: 1)
    message = "offload='host': the blocks take 0.0 GB of memory, 0.0 GB are free; use --offload disk"
    assert refusal("generate", path, "--prompt", "the", "--device", "cuda", "--offload", "host") == message
    assert formats.device.available_bytes() == 1


def test_memory_that_can_be_had():
    assert 10**8 < formats.device.available_bytes() < 10**14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--offload", "disk"), "offload='disk': is for a GPU; on the CPU the file stays mapped, leave it out"),
        (("--device-map", "all"), "device_map='all': must be 'auto', or a device for each block"),
        (
            ("--device-map", "auto"),
            "device 'cuda:0': torch finds no GPU here; use cpu, or a torch that is built for CUDA",
        ),
        (
            ("--device-map", "auto", "--offload", "host"),
            "offload='host': device_map says where everything goes; give one of the two",
        ),
        (
            ("--device-map", "auto", "--device", "cuda:1"),
            "device='cuda:1': device_map says where everything goes; give one of the two",
        ),
    ],
)
def test_placements_that_cannot_be_are_refused(tiny_files, options, message):
    assert refusal("generate", tiny_files.compressed("llama"), "--prompt", "the", *options) == message


def test_a_map_of_devices_is_an_argument_of_load(tiny_files):
    path = tiny_files.compressed("llama")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(qtool.load(path, device_map={"": "cpu"})(ids).logits, qtool.load(path)(ids).logits)
    with pytest.raises(KernelError, match=r"^device_map: 'model.layers.9' is no block; blocks are model.layers.0 to"):
        qtool.load(path, device_map={"": "cpu", "model.layers.9": 0})
    with pytest.raises(KernelError, match=r"^offload='tape': must be host or disk$"):
        qtool.load(path, offload="tape")


def test_a_missing_triton_is_named_with_what_installs_it(monkeypatch, tiny_files):
    found_gpu(monkeypatch)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        formats.device.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    message = "device 'cuda': triton is missing; pip install 'qtool[cuda]'"
    assert refusal("generate", tiny_files.compressed("llama"), "--prompt", "the", "--device", "cuda") == message


def test_a_device_is_an_option_of_generate(tiny_files):
    command = ["generate", tiny_files.compressed("llama"), "--prompt", "the of", "--max-new-tokens", "3"]
    assert run_qtool(*command, "--device", "cpu").stdout == run_qtool(*command).stdout


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_packed_cache_is_an_option_of_generate(tiny_files, bits):
    command = ["generate", tiny_files.compressed("llama"), "--prompt", "the of", "--max-new-tokens", "3"]
    assert run_qtool(*command, "--kv-bits", bits).stdout.startswith("the of")
