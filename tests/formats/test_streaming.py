"""Loading to devices and block by block, on what is here: the CPU, and meta, which computes shapes alone."""

from __future__ import annotations

import gc
import os
import shutil
import weakref

import pytest
import torch

import formats.build
import qtool
from formats.build import build_model
from formats.errors import FormatError, KernelError
from formats.modules import QuantLinear
from formats.placement import Placement, Sizes
from formats.reader import QtmFile
from formats.streaming import BlockStreamer
from formats.upload import HostMemory, Uploader

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.arange(24).view(2, 12) * 7 % 250


@pytest.mark.parametrize("n_bytes", [0, 1, 15, 16, 17, 32, 33, 100])
def test_pieces_arrive_whole(n_bytes):
    source = torch.arange(n_bytes, dtype=torch.uint8)
    read = []
    assert torch.equal(Uploader(CPU, piece_bytes=16).put(source, lambda *part: read.append(part)), source)
    assert [n for part in read for n in range(*part)] == list(range(n_bytes))


def built(path, placement, **options):
    file = QtmFile.open(path)
    return build_model(file, Sizes.of(file), placement, torch.float32, **options)


def streaming(*blocks):
    return Placement(CPU, (CPU,) * 3, frozenset(blocks))


@pytest.mark.parametrize("in_host_memory", [True, False], ids=["host", "disk"])
@pytest.mark.parametrize("blocks", [(1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_streamed_blocks_compute_what_they_would_if_they_stayed(tiny_files, family, blocks, in_host_memory):
    """Three forwards: an odd number of blocks takes the two slots in turn, also from the last to the first."""
    path = tiny_files.compressed(family)
    want, model = qtool.load(path), built(path, streaming(*blocks), in_host_memory=in_host_memory)
    for ids in (IDS, IDS[:1], IDS + 1):
        assert torch.equal(model(ids).logits, want(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:1], **options), want.generate(IDS[:1], **options))


@torch.no_grad()
def test_two_blocks_are_there_at_a_time_and_each_is_copied_once_a_forward(tiny_files, monkeypatch):
    copied = []
    copy = BlockStreamer._copy
    monkeypatch.setattr(
        BlockStreamer, "_copy", lambda self, index, slot: (copied.append((index, slot)), copy(self, index, slot))[1]
    )
    model = built(tiny_files.compressed("llama"), streaming(0, 1, 2))
    model(IDS)
    model(IDS)
    (hook, *_) = model.model.layers[0]._forward_pre_hooks.values()
    hook.func.__self__._coming.done.result()  # the copy for a third forward, which nobody has waited for
    assert copied == [(0, 0), (1, 1), (2, 0), (0, 1), (1, 0), (2, 1), (0, 0)]
    held = {m.section.untyped_storage().data_ptr() for m in model.model.layers.modules() if isinstance(m, QuantLinear)}
    assert len(held) == 2


@torch.no_grad()
def test_a_model_that_is_let_go_is_freed_with_its_slots_at_once(tiny_files):
    """Not when Python next looks for cycles: by then another model may want the GPU."""
    model = built(tiny_files.compressed("llama"), streaming(0, 1, 2))
    model(IDS)
    (hook, *_) = model.model.layers[0]._forward_pre_hooks.values()
    held = [weakref.ref(each) for each in (model, model.model.layers[0], hook.func.__self__)]
    gc.disable()
    try:
        del model, hook
        assert [each() for each in held] == [None, None, None]
    finally:
        gc.enable()


@torch.no_grad()
def test_blocks_out_of_turn(tiny_files):
    path = tiny_files.compressed("llama")
    want, model = qtool.load(path), built(path, streaming(0, 1, 2))
    x, mlp = torch.randn(1, 3, 32), [2, 0, 1, 1, 2]
    rotary = model.model.rotary_emb(x, torch.arange(3)[None])
    for index in mlp:
        got, expected = (m.model.layers[index](x, position_embeddings=rotary) for m in (model, want))
        assert torch.equal(got, expected)


@torch.no_grad()
def test_a_copy_that_fails_is_told_where_the_block_is_used_and_tried_again(tiny_files, monkeypatch):
    def fail(self, index, slot):
        raise OSError("the disk is gone")

    path = tiny_files.compressed("llama")
    model = built(path, streaming(0, 1))
    with monkeypatch.context() as patched:
        patched.setattr(BlockStreamer, "_copy", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            model(IDS)
    assert torch.equal(model(IDS).logits, qtool.load(path)(IDS).logits)


def test_a_model_that_is_loaded_in_inference_mode_runs_in_it_and_outside_of_it(tiny_files):
    path = tiny_files.compressed("llama")
    with torch.inference_mode():
        model = built(path, streaming(0, 1, 2), in_host_memory=True)
        inside = model(IDS).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, inside)


def test_streamed_blocks_have_no_gradients(tiny_files):
    model = built(tiny_files.compressed("llama"), streaming(1))
    x = model.model.embed_tokens(IDS).requires_grad_()
    message = r"^offload: blocks that are streamed have no gradients; load the model without it$"
    with pytest.raises(KernelError, match=message):
        model(inputs_embeds=x)
    with torch.no_grad():
        model(inputs_embeds=x)


def test_host_memory_is_taken_in_chunks():
    memory = HostMemory(pinned=False, chunk_bytes=256)
    parts = [memory.take(n) for n in (100, 60, 64, 200, 1000)]
    assert [len(part) for part in parts] == [100, 60, 64, 200, 1000]
    places = [part.data_ptr() for part in parts]
    assert places[1] - places[0] == 128 and places[2] - places[1] == 64  # the first chunk holds these three
    assert [part.untyped_storage().nbytes() for part in parts] == [256, 256, 256, 256, 1024]


def test_a_loaded_model_is_not_saved_as_what_nothing_could_read(tiny_files, tmp_path):
    message = r"^a model that qtool.load made is not saved: its file is; for a folder, qtool export FILE$"
    with pytest.raises(FormatError, match=message):
        qtool.load(tiny_files.compressed("llama")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_a_file_that_is_written_to_meanwhile_is_noticed(tiny_files, tmp_path):
    path = shutil.copy(tiny_files.compressed("llama"), tmp_path / "copy.qtm")
    file = QtmFile.open(path)
    streamed, held = (
        build_model(file, Sizes.of(file), streaming(1), None, in_host_memory=held) for held in (False, True)
    )
    want = held(IDS).logits
    os.utime(path, ns=(0, 0))
    message = f"{path}: was written to while it was in use; load it again"
    with pytest.raises(FormatError) as caught:
        streamed(IDS)
    assert str(caught.value) == message
    with pytest.raises(FormatError, match="was written to while it was in use"):
        file.section(next(iter(file.tensors.values())))
    assert torch.equal(held(IDS).logits, want)


def test_a_file_that_is_replaced_meanwhile_stays_what_it_was(tiny_files, tmp_path):
    """As qtool itself replaces one: by renaming."""
    path = shutil.copy(tiny_files.compressed("llama"), tmp_path / "copy.qtm")
    with QtmFile.open(path) as file:
        os.replace(shutil.copy(tiny_files.compressed("gpt2"), tmp_path / "other.qtm"), path)
        assert len(file.section(file.tensors["model.norm.weight"])) == 4 * 32


@torch.no_grad()
def test_inputs_follow_the_blocks_to_other_devices(tiny_files):
    """From the second block on the model is on meta, where a forward gives the shape alone."""
    placement = Placement(META, (CPU, META, META))
    model = built(tiny_files.compressed("qwen2"), placement)
    weights = [module.section.device for module in model.model.layers[0].modules() if isinstance(module, QuantLinear)]
    assert set(weights) == {CPU}
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].device))
    model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].device))
    hidden = torch.randn(1, 4, 32)
    rotary = model.model.rotary_emb(hidden.to(META), torch.arange(4, device=META)[None])
    rotary = tuple(torch.zeros(part.shape) for part in rotary)
    for layer in model.model.layers:
        hidden = layer(hidden, position_embeddings=rotary)
    assert seen == [CPU, META]
    assert model.lm_head(model.model.norm(hidden)).shape == (1, 4, 260)
    assert model.lm_head(torch.randn(1, 4, 32)).device == META


def test_on_another_device_nothing_is_left_on_the_host(tiny_files):
    model = built(tiny_files.compressed("gpt2"), Placement(META, (META,) * 3))
    assert {t.device for t in (*model.parameters(), *model.buffers())} == {META}


def test_a_layer_that_no_kernel_takes_is_decoded_with_one_warning(tiny_files, monkeypatch):
    def refuse(encoding, shape):
        if shape == (32, 80):  # down_proj of every block
            raise KernelError("no kernel")

    monkeypatch.setattr(formats.build, "layout_of", refuse)
    with pytest.warns(UserWarning) as caught:
        model = built(tiny_files.compressed("llama"), Placement(META, (META,) * 3))
    (warning,) = caught
    assert str(warning.message).endswith(
        "llama.qtm: 3 layers are decoded to torch.float32, as no GPU kernel takes them; "
        "the first is 'model.layers.0.mlp.down_proj.weight'"
    )
    assert isinstance(model.model.layers[1].mlp.down_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
