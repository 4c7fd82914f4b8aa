"""Perplexity and divergence against a plain computation with transformers alone."""

import hashlib

import numpy as np
import pytest
import torch
from invoke import qtool_json, refusal, run_qtool
from tiny import load_reference

import qtool as api
from formats.kv_cache import PackedCache
from qtool import evaluation, states
from qtool.checkpoint import open_checkpoint
from qtool.numerics import exact_float32
from qtool.protocol import Protocol

SEQ_LEN = 48


def windows_of(tiny_files, seq_len=SEQ_LEN):
    """The GPTQ protocol: tokenized once, windows side by side, the tail dropped. One byte is one token."""
    ids = torch.tensor(
        open_checkpoint(str(tiny_files.model("llama"))).tokenizer()(tiny_files.text.read_text()).input_ids
    )
    assert len(ids) == tiny_files.text.stat().st_size
    assert len(ids) % seq_len  # there is a tail to drop
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


@torch.no_grad()
def log_probs(model, ids):
    """[windows, seq - 1, vocab] in float64."""
    with exact_float32():
        return torch.log_softmax(model(ids).logits[:, :-1].double(), -1)


def perplexity_of(logs, ids):
    return torch.nn.functional.nll_loss(logs.flatten(0, 1), ids[:, 1:].flatten()).exp().item()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_perplexity_is_the_plain_one(tiny_files, family):
    ids = windows_of(tiny_files)
    logs = log_probs(load_reference(tiny_files.model(family)), ids)
    model = tiny_files.model(family)
    result = qtool_json("eval", "perplexity", model, "--data", tiny_files.text, "--seq-len", SEQ_LEN)
    assert result["perplexity"] == pytest.approx(perplexity_of(logs, ids), rel=1e-5)
    assert (result["windows"], result["tokens"]) == (len(ids), len(ids) * (SEQ_LEN - 1))
    assert result["data_sha256"] == hashlib.sha256(tiny_files.text.read_bytes()).hexdigest()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gptj", "gpt_neox", "opt", "mixtral"])
def test_rounded_keys_and_values_are_those_of_a_cache(tiny_files, family, bits):
    folder, ids = tiny_files.model(family), windows_of(tiny_files)[:6]
    model = load_reference(folder)
    with exact_float32(), torch.no_grad():
        logits = model(ids, cache=PackedCache(model.config, bits)).logits
        plain = perplexity_of(log_probs(model, ids), ids)
    options = ("--data", tiny_files.text, "--seq-len", SEQ_LEN, "--max-windows", 6)
    result = qtool_json("eval", "perplexity", folder, *options, "--kv-bits", bits, "--baseline", folder)
    want = perplexity_of(torch.log_softmax(logits[:, :-1].double(), -1), ids)
    assert result["perplexity"] == pytest.approx(want, rel=1e-5)
    assert result["baseline_perplexity"] == pytest.approx(plain, rel=1e-5)
    assert (result["kv_bits"], result["kl_mean"] > 0) == (bits, True)


def test_a_model_that_reads_no_cache_is_refused(tiny_files, monkeypatch):
    monkeypatch.setattr("qtool.model._has_cache", lambda call: False)
    folder = tiny_files.model("llama")
    command = ["eval", "perplexity", folder, "--data", tiny_files.text, "--seq-len", SEQ_LEN, "--kv-bits", 4]
    assert refusal(*command) == f"{folder}: its blocks take no cache that --kv-bits could round; leave it out"


def test_max_windows_takes_the_first_ones(tiny_files):
    ids = windows_of(tiny_files)[:5]
    logs = log_probs(load_reference(tiny_files.model("llama")), ids)
    options = ("--data", tiny_files.text, "--seq-len", SEQ_LEN, "--max-windows", 5)
    result = qtool_json("eval", "perplexity", tiny_files.model("llama"), *options)
    assert result["perplexity"] == pytest.approx(perplexity_of(logs, ids), rel=1e-5)
    assert result["windows"] == 5


def test_default_window_is_the_context_when_that_is_short(tiny_files):
    ids = windows_of(tiny_files, 128)
    logs = log_probs(load_reference(tiny_files.model("llama")), ids)
    result = qtool_json("eval", "perplexity", tiny_files.model("llama"), "--data", tiny_files.text)
    assert result["perplexity"] == pytest.approx(perplexity_of(logs, ids), rel=1e-5)
    assert result["seq_len"] == 128


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_the_plain_one(tiny_files, family):
    """At 3 bits, so that the two models disagree now and then. KL runs from the baseline to the model."""
    file, folder = tiny_files.compressed(family, "--bits", "3"), tiny_files.model(family)
    ids = windows_of(tiny_files)
    model, base = log_probs(api.load(file), ids), log_probs(load_reference(folder), ids)
    kl = (base.exp() * (base - model)).sum(-1).flatten()
    agree = (model.argmax(-1) == base.argmax(-1)).double().mean().item()
    options = ("--baseline", folder, "--data", tiny_files.text, "--seq-len", SEQ_LEN)
    result = qtool_json("eval", "perplexity", file, *options)
    assert result["perplexity"] == pytest.approx(perplexity_of(model, ids), rel=1e-5)
    assert result["baseline_perplexity"] == pytest.approx(perplexity_of(base, ids), rel=1e-5)
    assert result["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result["kl_p99"] == pytest.approx(np.percentile(kl.numpy(), 99), rel=1e-4)
    assert result["same_top"] == pytest.approx(agree, abs=2 / kl.numel())  # a tie can fall either way
    assert 0.3 < agree < 1
    assert result["kl_p99"] > result["kl_mean"] > 0


@pytest.mark.parametrize("what", ["model", "compressed"])
def test_a_model_does_not_diverge_from_itself(tiny_files, what):
    path = getattr(tiny_files, what)("llama")
    result = qtool_json("eval", "perplexity", path, "--baseline", path, "--data", tiny_files.text, "--seq-len", SEQ_LEN)
    assert (result["kl_mean"], result["kl_p99"], result["same_top"]) == (0, 0, 1)
    assert result["perplexity"] == result["baseline_perplexity"]


def test_a_file_equals_its_exported_folder(tiny_files, tmp_path):
    file = tiny_files.compressed("gpt2")
    assert run_qtool("export", file, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    options = ("--baseline", tmp_path / "dense", "--data", tiny_files.text, "--seq-len", SEQ_LEN)
    result = qtool_json("eval", "perplexity", file, *options)
    assert (result["kl_mean"], result["same_top"]) == (0, 1)


def evaluate_with(tiny_files, monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(states if name == "TOKENS_PER_BATCH" else evaluation, name, value)
    result = evaluation.evaluate_perplexity(
        open_checkpoint(str(tiny_files.compressed("gemma2"))),
        baseline=open_checkpoint(str(tiny_files.model("gemma2"))),
        data=str(tiny_files.text),
        protocol=Protocol(seq_len=SEQ_LEN, max_windows=7),
    )
    return {
        key: value for key, value in result.to_dict().items() if isinstance(value, int | float) and key != "seconds"
    }


@pytest.mark.parametrize(
    "constants",
    [
        {"TOKENS_PER_BATCH": 1},
        {"TOKENS_PER_BATCH": 3 * SEQ_LEN},  # the last batch is a short one
        {"TOKENS_PER_BATCH": 1 << 30},
        {"LOGITS_AT_A_TIME": 1},
        {"LOGITS_AT_A_TIME": 5 * 260},  # 47 predictions of a window by fives: the last part is short
        {"STATES_BYTES": 1},  # a round for every window
        {"STATES_BYTES": 3 * 4 * SEQ_LEN * 2 * 32, "TOKENS_PER_BATCH": SEQ_LEN},  # rounds of 3, 3 and 1 windows
        {"TOKENS_PER_BATCH": 100, "LOGITS_AT_A_TIME": 46 * 260},
    ],
)
def test_how_the_work_is_cut_does_not_matter(tiny_files, monkeypatch, constants):
    want = evaluate_with(tiny_files, monkeypatch)
    got = evaluate_with(tiny_files, monkeypatch, **constants)
    assert got == pytest.approx(want, rel=1e-5)


def test_no_more_states_are_held_than_the_bound_allows(tiny_files, monkeypatch):
    """Rounds of two windows of two models: the most that any block is run on between two loads of its weights."""
    monkeypatch.setattr(states, "TOKENS_PER_BATCH", SEQ_LEN)
    monkeypatch.setattr(evaluation, "STATES_BYTES", 2 * 4 * SEQ_LEN * 2 * 32 + 100)
    held, run_blocks = [], evaluation._run_blocks

    def recorded(model, batches, bar):
        hidden = run_blocks(model, batches, bar)
        held.append(sum(h.nbytes for h in hidden))
        return hidden

    monkeypatch.setattr(evaluation, "_run_blocks", recorded)
    evaluate_with(tiny_files, monkeypatch)
    assert len(held) == 2 * 4  # 7 windows
    assert all(a + b <= evaluation.STATES_BYTES for a, b in zip(held[::2], held[1::2], strict=True))
