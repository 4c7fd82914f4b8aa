"""Encoder-decoders, above all the Switch Transformer: experts are listed one by one, and tokens may find no room."""

from __future__ import annotations

import shutil

import pytest
import torch
from blockwise import blockwise_logits, some_ids
from interrupted import interrupt
from invoke import qtool_json, refusal, run_qtool
from safetensors.torch import load_file, save_file
from targeting import FAST
from tiny import SEQ2SEQ, load_reference, save_tokenizer
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import qtool
from formats.build import build_model
from formats.experts import expert_of, mixtures
from formats.kernels.layout import is_ternary
from formats.listed_experts import ListedExperts, separate_listed_experts
from formats.placement import Placement, Sizes
from formats.reader import QtmFile
from formats.skeleton import config_from_dict
from qtool.checkpoint import open_checkpoint
from qtool.errors import CheckpointError
from qtool.mixture import Mixture, RoutedTokens
from qtool.numerics import exact_float32
from qtool.pictures.depth import by_depth
from qtool.seq2seq import blockwise_model
from qtool.states import HiddenStates

SWITCH = "switch_transformers"
SOME = ("--min-expert-tokens", "8")
NEW_TOKENS = 8


def halves(ids):
    """(what the encoder reads, what the decoder is to write)."""
    return ids.tensor_split([ids.shape[1] // 2], dim=1)


def seq2seq_logits(model, ids):
    """As transformers computes them, which shifts the decoder's tokens itself."""
    encoder, labels = halves(ids)
    with exact_float32():
        return model(input_ids=encoder, labels=labels.contiguous()).logits


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 48), (3, 33), (2, 2)])
def test_blockwise_logits_equal_transformers(tiny_files, family, batch, seq_len):
    folder, ids = tiny_files.model(family), some_ids(batch)[:, :seq_len]
    want = seq2seq_logits(load_reference(folder), ids)
    torch.testing.assert_close(blockwise_logits(folder, ids), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_every_kind_goes_all_the_way(tiny_files, family, tmp_path):
    """compress, load, eval, generate, verify --against, and both exports."""
    folder, ids = tiny_files.model(family), some_ids(batch=2)
    file = tiny_files.compressed(family)
    loaded = seq2seq_logits(qtool.load(file), ids)
    torch.testing.assert_close(loaded, blockwise_logits(file, ids), rtol=0, atol=1e-5)

    options = ("--baseline", folder, "--data", tiny_files.text, "--seq-len", 64)
    quality = qtool_json("eval", "perplexity", file, *options)
    assert quality["perplexity"] == pytest.approx(quality["baseline_perplexity"], rel=0.1)
    assert 0 < quality["kl_mean"] < 0.05
    assert qtool_json("eval", "kl", file, *options)["kl_mean"] == pytest.approx(quality["kl_mean"], rel=1e-3)
    assert (quality["encoder_tokens"], quality["tokens"]) == (32, 32 * quality["windows"])
    assert qtool_json("verify", file, "--against", folder, "--calibration", tiny_files.text)["ok"]

    for kind in ("dense", "transformers"):
        assert run_qtool("export", file, "--to", kind, "-o", tmp_path / kind).exit_code == 0
        exported = load_reference(tmp_path / kind)
        torch.testing.assert_close(seq2seq_logits(exported, ids), loaded, rtol=0, atol=1e-5)
    prompt = torch.tensor([qtool.load_tokenizer(file)("the one").input_ids])
    ids = load_reference(tmp_path / "dense").generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False
    )
    said = qtool_json("generate", file, "--prompt", "the one", "--max-new-tokens", NEW_TOKENS)
    assert len(set(ids[0].tolist())) == 1 + NEW_TOKENS
    assert said["text"] == qtool.load_tokenizer(file).decode(ids[0], skip_special_tokens=True)
    shown = run_qtool("generate", file, "--prompt", "the one", "--max-new-tokens", NEW_TOKENS).stdout
    assert shown == said["text"] + "\n"  # without the prompt, which it does not continue


def test_what_was_scored_is_said(tiny_files):
    """Overlapping by half, every token but those of the first half is scored, as the perplexity of their likelihood."""
    folder, options = tiny_files.model(SWITCH), ("--data", tiny_files.text, "--seq-len", 16, "--max-windows", 3)
    told = run_qtool("eval", "perplexity", folder, *options, "--stride", 8).stdout
    assert "windows     3 of 16 tokens, 8 apart, 24 scored" in told
    assert "halves      the encoder reads the first 8 tokens of a window, the decoder is scored on the others" in told
    found = qtool_json("eval", "perplexity", folder, *options)
    ids = torch.tensor(qtool_tokens(folder, tiny_files.text)[:48]).view(3, 16)
    logits, (_, labels) = seq2seq_logits(load_reference(folder), ids), halves(ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    behind = qtool_json("eval", "perplexity", folder, *options, "--protocol", "llama.cpp")
    assert behind["tokens"] == 3 * 7


def qtool_tokens(folder, text):
    return open_checkpoint(str(folder)).tokenizer()(text.read_text(encoding="utf-8")).input_ids


def routed(family_folder, ids):
    """Mixture -> tokens of each expert, as transformers' router of the whole model sends them."""
    model, counts = load_reference(family_folder), {}

    def count(experts, masks):
        counts[experts] = masks.sum((0, 1)).tolist()

    for name, module in model.named_modules():
        if name.endswith("mlp.router"):
            experts = name.removesuffix("router") + "experts"
            module.register_forward_hook(lambda module, args, out, experts=experts: count(experts, out[0]))
    seq2seq_logits(model, ids)
    return counts


def test_experts_of_both_stacks_read_the_tokens_that_reach_them(tiny_files, tmp_path):
    """Against transformers' router, and the block as transformers runs it; some tokens find no room."""
    folder, ids = tiny_files.model(SWITCH), some_ids(batch=3)
    want, found = routed(folder, ids), {}
    model = blockwise_model(open_checkpoint(str(folder)))
    states = HiddenStates(tmp_path, ids, 2)
    with exact_float32():
        with model.outside(head=False):
            states.write(0, map(model.embed, states.batches))
        for index in range(len(model.blocks)):
            with model.block(index):
                outputs = [model.run(index, x) for x in states.read(index)]
            if (name := model.mixture(index)) is not None:
                seen = {}
                with model.block(index, experts=False):
                    tokens = RoutedTokens(Mixture(model, index, name), states)
                    tokens.visit(1, lambda names, stats, seen=seen: seen.update(stats))
                    with tokens.replayed():
                        given = [model.run(index, x) for x in states.read(index)]
                torch.testing.assert_close(torch.cat(given), torch.cat(outputs), rtol=0, atol=1e-5)
                found[name] = tokens.counts
                for number, count in enumerate(tokens.counts):
                    for part in ("wi", "wo") if count else ():
                        assert seen[f"{name}.expert_{number}.{part}"].n_tokens == count
            states.write(index + 1, outputs)
    assert found == want and len(found) == 2
    assert any(sum(counts) < 3 * 24 for counts in found.values())


def test_the_file_says_what_reached_each_expert(tiny_files):
    found = qtool_json("inspect", tiny_files.compressed(SWITCH, *SOME), "--experts")
    rows, counted = found["experts"], found["quality"]["experts"]
    assert [row["mixture"].split(".")[0] for row in rows] == ["encoder"] * 4 + ["decoder"] * 4
    assert len(rows) == 2 * 4 and all(row["error"] > 0 for row in rows)
    for row in rows:
        of_mixture = counted[row["mixture"]]
        assert row["tokens"] == of_mixture["tokens"][row["expert"]] <= 4 * 12  # windows, places
        assert (row["statistics"] == "all") == (row["tokens"] < 8) == (row["expert"] in of_mixture["pooled"])
    dense = {row["name"] for row in found["tensors"] if row["encoding"] == "dense" and len(row["shape"]) == 2}
    kinds = {name.split(".")[-2] for name in dense}
    assert kinds == {"classifier", "relative_attention_bias"}  # routers and look-ups


def test_the_report_numbers_the_blocks_of_both_stacks_through(tiny_files, tmp_path):
    with QtmFile.open(tiny_files.compressed(SWITCH)) as file:
        depth = by_depth(file.header)
    found = {(depth.kinds[row], depth.blocks[column]): len(entries) for (row, column), entries in depth.cells.items()}
    assert list(depth.blocks) == ["0", "1", "2", "3", "4"]
    assert [block for kind, block in found if kind == "layer.*.EncDecAttention.q"] == ["2", "3", "4"]
    experts = {block: n for (kind, block), n in found.items() if kind == "layer.*.mlp.experts.expert_*.wi"}
    assert experts == {"1": 4, "3": 4}
    assert run_qtool("inspect", tiny_files.compressed(SWITCH), "--report", tmp_path / "a.html").exit_code == 0


def test_ternary_experts_in_both_stacks(tiny_files):
    """And the rest in 4 bits."""
    file = tiny_files.compressed(SWITCH, "--method", "ternary", *SOME)
    with QtmFile.open(file) as opened:
        ternary = {name for name, entry in opened.tensors.items() if is_ternary(entry.encoding)}
        assert ternary == {name for name in opened.tensors if expert_of(name) is not None} and len(ternary) == 2 * 4 * 2
    rows = qtool_json("inspect", file, "--experts")["experts"]
    assert all(0.3 < row["zeros"] < 1 for row in rows)
    ids = some_ids(batch=2)
    torch.testing.assert_close(seq2seq_logits(qtool.load(file), ids), blockwise_logits(file, ids), rtol=0, atol=1e-5)


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(tiny_files, output, monkeypatch):
    """Within the decoder: what the first blocks of both stacks gave those behind them is found again."""
    command = ["compress", tiny_files.model(SWITCH), "-o", output, *tiny_files.compress_options(*SOME)]
    interrupt(monkeypatch, command, n_steps=4)
    again = run_qtool(*command)
    assert again.exit_code == 0 and "resumes after 3 of 5 blocks" in again.stderr
    assert output.read_bytes() == tiny_files.compressed(SWITCH, *SOME).read_bytes()


def test_a_target_spreads_bits_over_both_stacks(tiny_files):
    found = qtool_json("inspect", tiny_files.compressed(SWITCH, "--target-bits", "5.5", *FAST))
    assert 5.3 < found["bits_per_weight"] <= 5.5
    bits = {(row["name"].split(".")[0], row["bits"]) for row in found["tensors"] if row["encoding"] == "uniform"}
    assert all(len({b for stack, b in bits if stack == one}) > 1 for one in ("encoder", "decoder"))


def test_streamed_blocks_compute_what_they_would_if_they_stayed(tiny_files):
    file, ids = tiny_files.compressed(SWITCH), some_ids(batch=2)
    opened, cpu = QtmFile.open(file), torch.device("cpu")
    placement = Placement(cpu, (cpu,) * 5, frozenset({0, 2, 3}))
    model = build_model(opened, Sizes.of(opened), placement, torch.float32)
    for _ in range(2):
        assert torch.equal(seq2seq_logits(model, ids), seq2seq_logits(qtool.load(file), ids))


def test_a_head_of_its_own_is_kept(tiny_files, tmp_path):
    """T5 1.1: encoder and decoder share an embedding, the head is another, and outputs are not scaled."""
    torch.manual_seed(2)
    config = AutoConfig.for_model("t5", **SEQ2SEQ["t5"], feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 6)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    assert "lm_head.weight" in load_file(tmp_path / "model/model.safetensors")
    ids, file = some_ids(), tmp_path / "out.qtm"
    want = seq2seq_logits(load_reference(tmp_path / "model"), ids)
    torch.testing.assert_close(blockwise_logits(tmp_path / "model", ids), want, rtol=0, atol=1e-5)
    command = ["compress", tmp_path / "model", "-o", file, *tiny_files.compress_options("--bits", "8")]
    assert run_qtool(*command).exit_code == 0
    loaded = seq2seq_logits(qtool.load(file), ids)
    torch.testing.assert_close(loaded, want, rtol=0, atol=0.1)
    torch.testing.assert_close(loaded, blockwise_logits(file, ids), rtol=0, atol=1e-5)
    for kind in ("dense", "transformers"):
        assert run_qtool("export", file, "--to", kind, "-o", tmp_path / kind).exit_code == 0
        torch.testing.assert_close(seq2seq_logits(load_reference(tmp_path / kind), ids), loaded, rtol=0, atol=1e-5)
    assert run_qtool(*command, "--ignore", "lm_head", "--force").exit_code == 0
    message = refusal("export", file, "--to", "transformers", "-o", tmp_path / "other")
    assert message.startswith(f"{file}: of 'shared.weight' and 'lm_head.weight', which the config ties, just one is ")
    assert message.endswith("export it --to dense")


def test_a_head_that_is_stored_again_is_the_embedding(tiny_files, tmp_path):
    """As the published folders have it: one tensor under four names."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_files.model(SWITCH), folder)
    tensors = load_file(folder / "model.safetensors")
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    save_file(tensors | {name: tensors["shared.weight"].clone() for name in names}, folder / "model.safetensors")
    checkpoint, ids = open_checkpoint(str(folder)), some_ids()
    model = blockwise_model(checkpoint)
    assert checkpoint.unused() == [] and "shared.weight" in model.outside_names()
    assert not set(names) & set(model.outside_names())
    want = blockwise_logits(tiny_files.model(SWITCH), ids)
    torch.testing.assert_close(blockwise_logits(folder, ids), want, rtol=0, atol=1e-5)


class Listed(torch.nn.ModuleList):
    """Experts that are told by numbers."""

    factor = 1.0

    def forward(self, hidden, numbers, weights):
        rows = [
            sum(w * self[n](x[None])[0] for n, w in zip(chosen.tolist(), of_one, strict=True))
            for x, chosen, of_one in zip(hidden, numbers, weights, strict=True)
        ]
        return self.factor * torch.stack(rows)


class Scaled(Listed):
    factor = 0.8


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.gate, self.up = (torch.nn.Linear(*shape) for shape in ((6, 4), (4, 6), (4, 6)))

    def forward(self, x):
        return self.out(self.gate(x).relu() * self.up(x))


def test_lists_of_experts_are_known_by_what_they_do():
    model = torch.nn.ModuleDict({"a": Listed(Gated() for _ in range(3)), "b": Scaled(Gated() for _ in range(3))})
    x, numbers, weights = torch.randn(5, 4), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    want = model["a"](x, numbers, weights)
    separate_listed_experts(model)
    assert [name for name, _ in mixtures(model)] == ["a"]  # the other does more than to weight and sum
    torch.testing.assert_close(model["a"](x, numbers, weights), want)
    assert model["a"].down_name == "out"
    gated = model["a"].expert(1)
    assert torch.equal(model["a"].between(1, x), gated.gate(x).relu() * gated.up(x))


def test_a_token_without_room_is_of_no_expert():
    listed = ListedExperts(torch.nn.ModuleDict({"e0": Gated(), "e1": Gated()}), "out", by_mask=True)
    mask = torch.tensor([[[0, 1]], [[0, 0]], [[1, 0]]])
    assert listed.chosen(mask).tolist() == [[1], [2], [0]]
    assert listed.routed(listed.chosen(mask))[2] == [1, 1]
    assert not listed(torch.randn(3, 4), mask, torch.ones(3, 1))[1].any()


@pytest.mark.parametrize("family", [SWITCH, "t5"])
def test_what_an_encoder_decoder_cannot_do_is_said_in_one_line(tiny_files, family, tmp_path):
    folder, file = tiny_files.model(family), tiny_files.compressed(family)
    options = tiny_files.compress_options("--calibration", "self")
    assert refusal("compress", folder, "-o", tmp_path / "out.qtm", *options) == (
        f"--calibration self: an encoder-decoder ({family}) continues a text, and writes none of its own; give a text"
    )
    message = f"kv_bits=4: {family} is an encoder-decoder, whose cache is not rounded; leave it out"
    assert refusal("generate", file, "--prompt", "the", "--kv-bits", 4) == message
    assert refusal("eval", "perplexity", file, "--data", tiny_files.text, "--kv-bits", 4) == message
    options = ("--baseline", tiny_files.model("llama"), "--data", tiny_files.text)
    assert refusal("eval", "perplexity", file, *options) == (
        "of model and baseline, one has an encoder and the other has none: not the same model"
    )


def test_predictions_kept_of_other_halves_are_refused(tiny_files, tmp_path):
    """Of the same text, tokens, and windows."""
    folder, saved = tiny_files.model(SWITCH), tmp_path / "base.logits"
    options = ("--data", tiny_files.text, "--seq-len", 16, "--max-windows", 2)
    assert run_qtool("eval", "kl", folder, "--baseline", folder, "--save-baseline", saved, *options).exit_code == 0
    assert qtool_json("eval", "kl", folder, "--baseline-logits", saved, *options)["kl_mean"] < 1e-3
    message = refusal("eval", "kl", tiny_files.model("llama"), "--baseline-logits", saved, *options)
    assert "its number of tokens for an encoder is 8, this run's is None; it is of another model" in message


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "led",
            "encoder-decoders of type 'led' are not supported: its blocks do not read states of one width, one for",
        ),
        ("marian", "models of type 'marian' are not supported: they compute model.decoder.embed_positions.weight"),
    ],
)
def test_encoder_decoders_of_another_make_are_refused_by_their_type(tmp_path, kind, message):
    """Longformer's encoder pads what it reads; Marian's positions are stored nowhere."""
    parts = ("layers", "attention_heads", "ffn_dim")
    sizes = {f"{stack}_{part}": 2 for stack in ("encoder", "decoder") for part in parts}
    tokens = {"vocab_size": 260, "decoder_start_token_id": 2, "pad_token_id": 1}
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, d_model=16, **tokens, **sizes)).save_pretrained(
        tmp_path
    )
    model = blockwise_model(open_checkpoint(str(tmp_path)))
    with pytest.raises(CheckpointError) as refused, model.outside(head=False):
        model.embed(some_ids()[:, :20])
    assert str(refused.value).startswith(f"{tmp_path}: {message}")


def test_an_encoder_of_something_else_than_text_is_refused_by_its_type(tmp_path, tiny_files):
    from formats.errors import FormatError
    from formats.skeleton import build_skeleton

    with pytest.raises(FormatError, match=r"^model_type='whisper': no encoder-decoder for text can be built from its"):
        build_skeleton(config_from_dict({"model_type": "whisper"}))


def test_a_decoder_that_starts_with_nothing_is_refused(tiny_files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_files.model("t5"), folder)
    config = AutoConfig.from_pretrained(folder)
    config.decoder_start_token_id = config.bos_token_id = None
    config.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    message = refusal("compress", folder, "-o", tmp_path / "out.qtm", *tiny_files.compress_options())
    assert message == f"{folder}: config.json has no decoder_start_token_id; add it"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: {}, "is missing from the weights; download the model again"),
        (lambda weight: {"": weight[:5]}, "has shape [5, 32], the model's config implies [48, 32]; the two are not of"),
        (lambda weight: {"": weight * torch.nan}, "has NaN or infinite values; the model is broken"),
    ],
)
def test_an_expert_that_is_not_what_it_should_be_is_named(tiny_files, tmp_path, change, said):
    folder, name = tmp_path / "model", "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
    shutil.copytree(tiny_files.model(SWITCH), folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {name + suffix: tensor for suffix, tensor in change(tensors.pop(name)).items()}
    save_file(tensors | changed, folder / "model.safetensors")
    message = refusal("compress", folder, "-o", tmp_path / "out.qtm", *tiny_files.compress_options())
    assert message.startswith(f"{folder}: ") and f"{name} {said}" in message
