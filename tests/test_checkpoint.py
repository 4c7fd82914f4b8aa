"""STAGE 1, load: the same model from one file, shards, any dtype and GGUF; one block in memory at a time."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from blockwise import blockwise_logits, some_ids
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from invoke import qtool_json, refusal, run_qtool
from safetensors.torch import load_file, save_file
from tiny import load_reference, make_model
from tiny_gguf import write_gguf

import qtool as api
from formats.encoding import Dense
from formats.reader import QtmFile
from qtool.checkpoint import find_tensor, open_checkpoint
from qtool.model import BlockwiseModel

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dense_dtypes(file) -> set[str]:
    with QtmFile.open(file) as opened:
        return {e.encoding.dtype for e in opened.tensors.values() if isinstance(e.encoding, Dense)}


def compress(tiny_files, model, output, *options):
    result = run_qtool("compress", model, "-o", output, *tiny_files.compress_options(*options))
    assert result.exit_code == 0, result.output
    return output


def without_provenance(file):
    """Every section's checksum and the recipe: what the weights and the options decide."""
    with QtmFile.open(file) as opened:
        return [(s.label, s.sha256) for s in opened.header.sections()], opened.header.recipe


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_shards_with_an_index_give_the_same_file(tiny_files, family, tmp_path):
    sharded = make_model(family, tmp_path / family, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    file = compress(tiny_files, sharded, tmp_path / "out.qtm")
    assert without_provenance(file) == without_provenance(tiny_files.compressed(family))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_stored_dtype(tiny_files, family, dtype, tmp_path):
    """Weights of 16 bits are computed with in float32, and what is left dense is stored as it was."""
    folder = make_model(family, tmp_path / family, dtype=DTYPES[dtype])
    ids = some_ids()
    want = load_reference(folder)(ids).logits
    torch.testing.assert_close(blockwise_logits(folder, ids), want.detach(), rtol=0, atol=1e-5)
    file = compress(tiny_files, folder, tmp_path / "out.qtm", "--embeddings", "16", "--method", "rtn")
    assert dense_dtypes(file) == {dtype}
    stored = load_file(folder / "model.safetensors")
    with QtmFile.open(file) as opened:
        for name, entry in opened.tensors.items():
            if isinstance(entry.encoding, Dense):
                assert np.array_equal(opened.dense(name), stored[name].float().numpy()), name


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tiny_files, tied, tmp_path):
    """The head of a tied model follows the embedding through quantization; both stay one tensor."""
    family = "llama" if tied else "mistral"
    loaded = api.load(tiny_files.compressed(family))
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    rows = embedding(torch.arange(260))
    identity = torch.eye(32)
    assert torch.equal(head(identity).T, rows) == tied
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model(family))))
    assert ("lm_head.weight" in model.outside_names()) != tied


def test_tied_in_the_config_though_a_head_is_stored(tmp_path):
    """Some files hold the head twice; what counts is what transformers makes of them."""
    folder = make_model("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = some_ids()
    want = load_reference(folder)(ids).logits.detach()
    torch.testing.assert_close(blockwise_logits(folder, ids), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "n_biases"), [("qwen2", 9), ("gpt2", 12), ("gpt_neox", 12), ("opt", 18)])
def test_biases_survive_exactly(tiny_files, family, n_biases, tmp_path):
    """Random models have biases of zero; these have values that a lost or swapped bias would show."""
    model = load_reference(tiny_files.model(family))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    folder = tmp_path / family
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_files.model(family) / file).read_bytes())
    ids = some_ids()
    torch.testing.assert_close(blockwise_logits(folder, ids), model(ids).logits.detach(), rtol=0, atol=1e-5)

    loaded = api.load(compress(tiny_files, folder, tmp_path / "out.qtm", "--bits", "8"))
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and "norm" not in n and "ln_" not in n}
    assert len(biases) == n_biases
    for name, bias in biases.items():
        assert torch.equal(find_tensor(loaded, name), bias), name
    assert (loaded(ids).logits - model(ids).logits).abs().max() < 0.05 * model(ids).logits.abs().max()


# ---- the hub


def hub_answers(monkeypatch, error):
    """What the hub says; returns the ids that it was asked for."""
    asked = []

    def snapshot_download(hub_id, **options):
        asked.append(hub_id)
        if isinstance(error, Exception):
            raise error
        return str(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_id_offline(monkeypatch, tmp_path):
    asked = hub_answers(monkeypatch, LocalEntryNotFoundError("cannot find it in the cache\nand no network"))
    for name in ("org/name", "Qwen/Qwen2.5-0.5B"):  # a version number is not a file suffix
        message = refusal("compress", name, "-o", tmp_path / "out.qtm")
        assert message == (
            f"{name}: no such folder here, and the hub cannot be reached (offline?); give the path of a local model"
        )
    assert asked == ["org/name", "Qwen/Qwen2.5-0.5B"]
    assert list(tmp_path.iterdir()) == []


def test_hub_id_in_offline_mode_without_a_stand_in(monkeypatch, tmp_path):
    """huggingface_hub's own offline switch and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "the hub cannot be reached" in refusal("compress", "org/name", "-o", tmp_path / "out.qtm")


def test_hub_id_that_does_not_exist(monkeypatch, tmp_path):
    response = SimpleNamespace(headers={}, request=None)
    hub_answers(monkeypatch, RepositoryNotFoundError("404", response=response))
    message = refusal("compress", "org/name", "-o", tmp_path / "out.qtm")
    assert message == "org/name: no such folder here and no such model on the hub"


def test_hub_id_behind_terms(monkeypatch, tmp_path):
    response = SimpleNamespace(headers={}, request=None)
    hub_answers(monkeypatch, GatedRepoError("403", response=response))
    message = refusal("compress", "org/name", "-o", tmp_path / "out.qtm")
    assert message.startswith("org/name: the hub gives this model only to those who accepted its terms")


def test_hub_id_in_the_cache(tiny_files, monkeypatch, tmp_path):
    hub_answers(monkeypatch, tiny_files.model("llama"))
    """The file is that of the folder, but for the name that its model card has for the base model."""
    file = compress(tiny_files, "org/name", tmp_path / "out.qtm")
    with QtmFile.open(file) as one, QtmFile.open(tiny_files.compressed("llama")) as other:
        named = dict(other.header.provenance) | {"base_model": "org/name"}
        assert one.header == replace(other.header, provenance=named)


@pytest.mark.parametrize("name", ["./org/name", "/org/name", "a/b/c", "name", "model.qtm", "org/name.gguf"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    asked = hub_answers(monkeypatch, LocalEntryNotFoundError("offline"))
    assert refusal("compress", name, "-o", tmp_path / "out.qtm") == (
        f"{name}: no such file or folder; a model of the hub is named org/name"
    )
    assert asked == []


# ---- GGUF


@pytest.fixture(scope="module")
def gguf_files(tiny_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    kinds = ("F32", "F16", "Q8_0")
    return {kind: write_gguf(tiny_files.model("llama"), folder / f"{kind}.gguf", kind) for kind in kinds}


@pytest.mark.parametrize(("kind", "error"), [("F32", 1e-5), ("F16", 2e-3), ("Q8_0", 0.05)])
def test_gguf_logits_equal_those_of_the_model_it_was_made_from(tiny_files, gguf_files, kind, error):
    """The rotary order of q and k is undone, and the tied head is found."""
    ids = some_ids(batch=2)
    want = load_reference(tiny_files.model("llama"))(ids).logits.detach()
    torch.testing.assert_close(blockwise_logits(gguf_files[kind], ids), want, rtol=0, atol=error)


def test_gguf_tokenizer(tiny_files, gguf_files):
    """The file has one merge more than the folder's tokenizer: `th` is one token."""
    plain = open_checkpoint(str(tiny_files.model("llama"))).tokenizer()
    tokenizer = open_checkpoint(str(gguf_files["F32"])).tokenizer()
    assert tokenizer("one é 1").input_ids == plain("one é 1").input_ids
    assert tokenizer("the").input_ids == [259, *plain("e").input_ids]
    assert tokenizer.decode(tokenizer("the oath").input_ids) == "the oath"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


@pytest.mark.parametrize(("kind", "dtypes"), [("F32", {"F32"}), ("Q8_0", {"F32", "F16"})])
def test_gguf_through_every_command(tiny_files, gguf_files, kind, dtypes, tmp_path):
    source = gguf_files[kind]
    file = compress(tiny_files, source, tmp_path / "out.qtm", "--bits", "8", "--embeddings", "16")
    assert dense_dtypes(file) == dtypes
    text = "the one é"
    assert api.load_tokenizer(file)(text).input_ids == open_checkpoint(str(source)).tokenizer()(text).input_ids
    result = qtool_json(
        "eval", "perplexity", file, "--baseline", source, "--data", tiny_files.text, "--seq-len", 64
    )  # fmt: skip
    assert result["perplexity"] == pytest.approx(result["baseline_perplexity"], rel=0.01)
    assert qtool_json("generate", file, "--prompt", text, "--max-new-tokens", 4)["text"]
    assert run_qtool("export", file, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    ids = some_ids()
    exported = load_reference(tmp_path / "dense")(ids).logits
    torch.testing.assert_close(api.load(file)(ids).logits, exported.detach(), rtol=0, atol=1e-5)


def test_gguf_gives_the_file_of_the_same_weights(tiny_files, gguf_files, tmp_path):
    """Without calibration nothing depends on the tokenizer: all tensors are those of the folder's file."""
    a = compress(tiny_files, gguf_files["F32"], tmp_path / "a.qtm", "--method", "rtn")
    b = compress(tiny_files, tiny_files.model("llama"), tmp_path / "b.qtm", "--method", "rtn")
    with QtmFile.open(a) as one, QtmFile.open(b) as other:
        assert {n: t.sha256 for n, t in one.tensors.items()} == {n: t.sha256 for n, t in other.tensors.items()}


# ---- one block in memory


def real_blocks(model: BlockwiseModel) -> list[int]:
    """The blocks that have a parameter with values."""
    return [i for i, block in enumerate(model.blocks) if any(not p.is_meta for p in block.parameters())]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_block_has_weights_inside_its_with_only(tiny_files, family):
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model(family))))
    assert all(p.is_meta for p in model.skeleton.parameters())
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            assert real_blocks(model) == [index]
            assert not any(p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in model.skeleton.parameters())
    with model.outside(head=True):
        assert real_blocks(model) == []
        assert not find_tensor(model.skeleton, model.outside_names()[0]).is_meta
    assert all(p.is_meta for p in model.skeleton.parameters())


def test_the_head_is_not_loaded_to_embed(tiny_files):
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model("mistral"))))
    with model.outside(head=False):
        assert model.skeleton.get_output_embeddings().weight.is_meta
        assert not model.skeleton.get_input_embeddings().weight.is_meta


@pytest.mark.parametrize("source", ["folder", "gguf", "qtm"])
def test_no_more_than_one_block_is_ever_loaded(tiny_files, gguf_files, source, monkeypatch, tmp_path):
    path = {"folder": tiny_files.model, "gguf": lambda _: gguf_files["F16"], "qtm": tiny_files.compressed}[source]
    seen, run = [], BlockwiseModel.run

    def spy(model, index, hidden):
        seen.append((index, real_blocks(model)))
        return run(model, index, hidden)

    monkeypatch.setattr(BlockwiseModel, "run", spy)
    if source != "qtm":
        compress(tiny_files, path("llama"), tmp_path / "out.qtm")
    assert run_qtool(
        "eval", "perplexity", path("llama"), "--data", tiny_files.text, "--seq-len", 64
    ).exit_code == 0  # fmt: skip
    assert {index for index, _ in seen} == {0, 1, 2}
    assert all(real == [index] for index, real in seen)


def test_the_same_tensor_is_read_again_after_its_block_was_freed(tiny_files):
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model("llama"))))
    name = model.tensor_names("model.layers.1.")[0]
    values = []
    for _ in range(2):
        with model.block(1):
            values.append(find_tensor(model.skeleton, name).clone())
    assert torch.equal(*values)
    stored = json.loads((tiny_files.model("llama") / "config.json").read_text())["dtype"]
    assert stored == "float32"


def test_stored_tensors_that_the_config_does_not_use_are_named(tiny_files, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_files.model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    result = run_qtool("compress", folder, "-o", tmp_path / "cut.qtm", *tiny_files.compress_options())
    assert result.exit_code == 0, result.output
    assert "9 stored tensors are not part of the model that config.json describes: model.layers.2." in result.stderr


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_kept(tiny_files, tmp_path):
    """As after fine-tuning the head alone: transformers unties then, and so do we."""
    folder = shutil.copytree(tiny_files.model("llama"), tmp_path / "own-head")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    want = load_reference(folder)(some_ids()).logits
    assert torch.allclose(blockwise_logits(folder, some_ids()), want, atol=1e-5)
    file = QtmFile.open(compress(tiny_files, folder, tmp_path / "own-head.qtm", "--bits", "8"))
    assert "lm_head.weight" in file.tensors
    assert (api.load(tmp_path / "own-head.qtm")(some_ids()).logits - want).abs().max() < 0.1 * want.abs().max()


def test_a_tied_embedding_stored_under_the_heads_name_only(tiny_files, tmp_path):
    folder = shutil.copytree(tiny_files.model("llama"), tmp_path / "head-only")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    want = load_reference(tiny_files.model("llama"))(some_ids()).logits
    assert torch.allclose(blockwise_logits(folder, some_ids()), want, atol=1e-5)
    file = QtmFile.open(compress(tiny_files, folder, tmp_path / "head-only.qtm"))
    assert "model.embed_tokens.weight" in file.tensors
    assert "lm_head.weight" not in file.tensors


def test_the_recipe_in_the_file_is_what_was_done(tiny_files, tmp_path):
    """Windows end at the model's context of 128; round to nearest calibrates nothing and orders nothing."""
    file = QtmFile.open(compress(tiny_files, tiny_files.model("llama"), tmp_path / "a.qtm", "--seq-len", "2048"))
    assert (file.header.recipe["calibration"]["samples"], file.header.recipe["calibration"]["seq_len"]) == (4, 128)
    rtn = QtmFile.open(
        compress(tiny_files, tiny_files.model("llama"), tmp_path / "b.qtm", "--method", "rtn")
    ).header.recipe
    assert rtn["calibration"] is None
    assert not any(rtn["linears"][option] for option in ("act_order", "scale_search", "input_scales"))
