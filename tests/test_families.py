"""Every supported family through compress, load, generate, eval and export."""

import pytest
import torch
from blockwise import blockwise_logits, some_ids
from invoke import qtool_json, run_qtool
from tiny import EXPERTS, FAMILIES, load_reference

import qtool as api
from calibration.capture import HessianCapture
from formats.encoding import Uniform
from formats.experts import fused_tensor
from formats.reader import QtmFile
from qtool.checkpoint import open_checkpoint
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32
from qtool.plan import plan_tensors
from qtool.recipe import QuantSpec, Recipe

NEW_TOKENS = 12


@pytest.fixture(params=[*FAMILIES, "mixtral", "gpt_oss"])  # test_experts.py has the other mixtures
def family(request):
    return request.param


@pytest.mark.parametrize("batch", [1, 2])
def test_blockwise_logits_equal_transformers(tiny_files, family, batch):
    folder, ids = tiny_files.model(family), some_ids(batch)
    with exact_float32():
        want = load_reference(folder)(ids).logits
    torch.testing.assert_close(blockwise_logits(folder, ids), want, rtol=0, atol=1e-5)


def test_load_equals_eval_and_the_exported_folder(tiny_files, family, tmp_path):
    file, ids = tiny_files.compressed(family), some_ids(batch=2)
    assert run_qtool("export", file, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    with exact_float32():
        loaded = api.load(file)(ids).logits
        exported = load_reference(tmp_path / "dense")(ids).logits
    torch.testing.assert_close(loaded, blockwise_logits(file, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded, exported, rtol=0, atol=1e-5)


def test_4_bits_change_the_logits_and_8_bits_hardly(tiny_files, family):
    ids = some_ids()
    original = blockwise_logits(tiny_files.model(family), ids)
    errors = []
    for bits in ("4", "8"):
        difference = blockwise_logits(tiny_files.compressed(family, "--bits", bits), ids) - original
        errors.append((difference.norm() / original.norm()).item())
    factor = 1.5 if family in EXPERTS else 4  # of a random model, the least error can choose another expert
    assert errors[0] > factor * errors[1] > 0


def test_perplexity_at_8_bits_is_within_one_percent(tiny_files, family):
    file = tiny_files.compressed(family, "--bits", "8")
    options = ("--data", tiny_files.text, "--seq-len", 64)
    result = qtool_json("eval", "perplexity", file, "--baseline", tiny_files.model(family), *options)
    assert result["perplexity"] == pytest.approx(result["baseline_perplexity"], rel=0.01)
    assert 0 < result["kl_mean"] < 0.05
    assert result["same_top"] > 0.9


def test_generate_gives_as_many_tokens_as_asked_for(tiny_files, family):
    file = tiny_files.compressed(family)
    model, tokenizer = api.load(file), api.load_tokenizer(file)
    prompt = tokenizer("the one", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, prompt["input_ids"].shape[1] + NEW_TOKENS)

    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    continuation = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    said = qtool_json("generate", file, "--prompt", "the one", "--max-new-tokens", NEW_TOKENS)
    assert said == {"prompt": "the one", "text": continuation}


def test_generate_is_the_decoded_models_own(tiny_files, family, tmp_path):
    """The packed weights with a key-value cache, against the exported ones without."""
    file = tiny_files.compressed(family)
    assert run_qtool("export", file, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    ids = some_ids()[:, :20]
    packed = api.load(file).generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = load_reference(tmp_path / "dense").generate(
        ids, attention_mask=torch.ones_like(ids), use_cache=False, **options
    )
    assert packed.tolist() == plain.tolist()


def test_every_parameter_is_quantized_or_left_dense_for_a_reason(tiny_files, family):
    folder = tiny_files.model(family)
    model = BlockwiseModel(open_checkpoint(str(folder)))
    plan = plan_tensors(model, Recipe(linears=QuantSpec(group_size=16)))
    reference = load_reference(folder)
    fused = {getattr(fused_tensor(model.skeleton, t.name), "name", t.name) for t in plan}
    assert sorted(fused) == sorted(name for name, _ in reference.named_parameters())
    assert sum(t.n_parameters for t in plan) == sum(p.numel() for p in reference.parameters())
    for tensor in plan:
        assert (tensor.spec is None) == bool(tensor.reason), tensor.name
    linears = {f"{n}.weight" for i in range(len(model.blocks)) for n in model.linears(i)}
    assert linears <= {t.name for t in plan if t.spec is not None}
    assert len(linears) >= 3 * len(model.blocks)


def test_the_file_holds_what_was_planned(tiny_files, family):
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model(family))))
    plan = plan_tensors(model, Recipe(linears=QuantSpec(group_size=16)))
    with QtmFile.open(tiny_files.compressed(family)) as file:
        assert file.tensors.keys() == {t.name for t in plan}
        for tensor in plan:
            entry = file.tensors[tensor.name]
            assert (entry.shape, entry.transposed) == (tensor.shape, tensor.transposed)
            assert isinstance(entry.encoding, Uniform) == (tensor.spec is not None)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", "q_proj k_proj v_proj|o_proj|gate_proj up_proj|down_proj"),
        ("gemma2", "q_proj k_proj v_proj|o_proj|gate_proj up_proj|down_proj"),
        ("phi3", "o_proj|qkv_proj|gate_up_proj|down_proj"),
        ("opt", "k_proj v_proj q_proj|out_proj|fc1|fc2"),
        ("gpt2", "c_attn|c_proj|c_fc|c_proj"),
        ("gpt_neox", "query_key_value|dense|dense_h_to_4h|dense_4h_to_h"),
    ],
)
def test_which_linears_share_their_statistics(tiny_files, family, groups):
    """Those that read one input, and no others."""
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model(family))))
    with exact_float32():
        with model.outside(head=False):
            hidden = model.embed(some_ids(batch=2))
        with model.block(0):
            stats = HessianCapture(model.linears(0)).run(lambda x: model.run(0, x), [hidden])
    found = {}
    for name, of_layer in stats.items():
        found.setdefault(id(of_layer), []).append(name.split(".")[-1])
        assert of_layer.n_tokens == 96
    assert "|".join(" ".join(names) for names in found.values()) == groups


def test_what_is_tied_is_stored_once(tiny_files):
    with QtmFile.open(tiny_files.compressed("llama")) as file:
        assert "model.embed_tokens.weight" in file.tensors
        assert "lm_head.weight" not in file.tensors
    with QtmFile.open(tiny_files.compressed("mistral")) as file:
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= file.tensors.keys()


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("qwen2", {"model.layers.0.self_attn.q_proj.bias": "norm, bias or other vector"}),
        ("qwen3", {"model.layers.0.self_attn.q_norm.weight": "norm, bias or other vector"}),
        ("gpt2", {"transformer.wpe.weight": "embedding of something else than tokens",
                  "transformer.h.0.mlp.c_fc.bias": None}),
        ("opt", {"model.decoder.embed_positions.weight": "embedding of something else than tokens",
                 "model.decoder.project_in.weight": "linear layer outside the blocks"}),
        ("mixtral", {"model.layers.0.mlp.gate.weight": "not a linear layer of a block"}),  # the router
        ("gpt_oss", {"model.layers.0.mlp.experts.3.gate_up_proj.bias": "norm, bias or other vector"}),
    ],
)  # fmt: skip
def test_what_is_left_dense_is_listed_with_its_reason(tiny_files, family, dense):
    options = tiny_files.compress_options("--dry-run")
    listed = qtool_json("compress", tiny_files.model(family), *options)["left_dense"]
    reasons = {row["name"]: row["reason"] for row in listed}
    for name, reason in dense.items():
        assert reasons[name] == (reason or reasons[name])
    assert all(reasons.values())
    found = qtool_json("inspect", tiny_files.compressed(family))
    assert {t["name"] for t in found["tensors"] if t["encoding"] == "dense"} == reasons.keys()
