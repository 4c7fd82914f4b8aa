"""`export --to dense`: an ordinary folder, in one file or in shards, that holds the decoded values."""

import json
import re

import pytest
import torch
from blockwise import blockwise_logits, some_ids
from invoke import qtool_json
from tiny import load_reference
from transformers import AutoTokenizer

import qtool as api
from formats.export import folder as export_folder
from formats.reader import QtmFile
from formats.tensors import decode_tensor


def export(file, folder, *options):
    return qtool_json("export", file, "--to", "dense", "-o", folder, *options)["files"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_shards_hold_whole_blocks(tiny_files, family, tmp_path, monkeypatch):
    """The folder loads as the single file does; the index names every tensor once."""
    monkeypatch.setattr(export_folder, "MAX_SHARD_BYTES", 50_000)
    file, folder = tiny_files.compressed(family), tmp_path / "dense"
    names = export(file, folder)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    blocks = {}
    for name, shard in index["weight_map"].items():
        if block := re.search(r"\.\d+\.", name):
            blocks.setdefault(block[0], set()).add(shard)
    assert blocks.keys() == {".0.", ".1.", ".2."}
    assert all(len(used) == 1 for used in blocks.values())
    ids = some_ids()
    want = blockwise_logits(file, ids)
    torch.testing.assert_close(load_reference(folder)(ids).logits.detach(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(blockwise_logits(folder, ids), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(tiny_files, dtype, tmp_path):
    """float32 holds the decoded values exactly; the others round them once."""
    file = tiny_files.compressed("llama")
    export(file, tmp_path / "dense", "--dtype", dtype)
    parameters = load_reference(tmp_path / "dense").state_dict()
    with QtmFile.open(file) as opened:
        for name, entry in opened.tensors.items():
            want = decode_tensor(opened, entry).to(getattr(torch, dtype)).float()
            assert torch.equal(parameters[name], want), name
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == dtype


def test_tokenizer_and_chat_template_come_along(tiny_files, tmp_path):
    file = tiny_files.compressed("llama")
    export(file, tmp_path / "dense")
    source = AutoTokenizer.from_pretrained(tiny_files.model("llama"))
    for tokenizer in (api.load_tokenizer(file), AutoTokenizer.from_pretrained(tmp_path / "dense")):
        assert tokenizer("the one é").input_ids == source("the one é").input_ids
        messages = [{"role": "user", "content": "one"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>one</s>"
        assert tokenizer.get_vocab() == source.get_vocab()


def test_generation_config_comes_along(tiny_files, tmp_path):
    export(tiny_files.compressed("llama"), tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "generation_config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)
    assert api.load(tiny_files.compressed("llama")).generation_config.eos_token_id == 257
