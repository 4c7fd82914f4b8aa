"""`qtool eval kl` against a plain computation, and the file that a baseline's predictions are kept in."""

import json
import os
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke import qtool_json, refusal, run_qtool
from safetensors.numpy import load_file
from test_evaluate import log_probs, perplexity_of, windows_of
from tiny import FAMILIES, load_reference, make_model

import qtool as api
import qtool.logits_file
from qtool import evaluation
from qtool.figures import mean, perplexity
from qtool.logits_layout import MAX_CODE, RANGE, decode, encode
from qtool.sizes import format_bytes

SEQ_LEN = 48
NOT_FIGURES = {"seconds", "tokens_sha256"}
CLOSE = {"kl_mean", "kl_mean_error", "kl_p50", "kl_p95", "kl_p99", "kl_max"}  # what a saved baseline changes at all
AGAIN = "save the baseline again"


@pytest.fixture(scope="module")
def models(tiny_files):
    """A file at 3 bits, so that it differs, and the folder that it was made from."""
    return tiny_files.compressed("llama", "--bits", "3"), tiny_files.model("llama")


@pytest.fixture(scope="module")
def sample(tiny_files):
    return ("--data", tiny_files.text, "--seq-len", SEQ_LEN, "--max-windows", 12)


@pytest.fixture(scope="module")
def direct(models, sample, tmp_path_factory):
    """What a comparison with the model itself gives, and the file that it saved."""
    path = tmp_path_factory.mktemp("saved") / "base.logits"
    result = qtool_json("eval", "kl", models[0], "--baseline", models[1], *sample, "--save-baseline", path)
    assert os.listdir(path.parent) == ["base.logits"]
    return result, path


@pytest.fixture
def saved(direct, tmp_path):
    """A copy of the saved file, to break."""
    return shutil.copy(direct[1], tmp_path / "copy.logits")


# ---- the figures


def test_figures_are_the_plain_ones(tiny_files, models, direct):
    ids = windows_of(tiny_files)[:12]
    model, base = log_probs(api.load(models[0]), ids), log_probs(load_reference(models[1]), ids)
    kl = (base.exp() * (base - model)).sum(-1).flatten().numpy()  # in float64
    agree = (model.argmax(-1) == base.argmax(-1)).double().flatten().numpy()
    nll, base_nll = (-logs.gather(2, ids[:, 1:, None]).flatten().numpy() for logs in (model, base))
    stretches = np.repeat(np.arange(12), SEQ_LEN - 1)
    result = direct[0]
    assert result["perplexity"] == pytest.approx(perplexity_of(model, ids), rel=1e-5)
    assert result["baseline_perplexity"] == pytest.approx(perplexity_of(base, ids), rel=1e-5)
    assert result["perplexity_ratio"] == pytest.approx(result["perplexity"] / result["baseline_perplexity"])
    assert result["kl_mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert result["kl_max"] == pytest.approx(kl.max(), rel=1e-4)
    for share in (50, 95, 99):
        assert result[f"kl_p{share}"] == pytest.approx(np.percentile(kl, share), rel=1e-4)
    assert result["same_top"] == pytest.approx(agree.mean(), abs=2 / len(kl))  # a tie can fall either way
    assert 0.3 < result["same_top"] < 1
    errors = {
        "perplexity": perplexity(nll, stretches),
        "baseline_perplexity": perplexity(base_nll, stretches),
        "perplexity_ratio": perplexity(nll - base_nll, stretches),
        "kl_mean": mean(kl, stretches),
    }
    for name, estimate in errors.items():
        assert result[f"{name}_error"] == pytest.approx(estimate.error, rel=1e-4)
    assert result["same_top_error"] == pytest.approx(mean(agree, stretches).error, abs=0.01)


def test_the_other_command_says_the_same(models, sample, direct):
    result = qtool_json("eval", "perplexity", models[0], "--baseline", models[1], *sample)
    for key in result.keys() - NOT_FIGURES:
        assert result[key] == direct[0][key], key


def test_a_model_does_not_diverge_from_itself(models, sample, tmp_path):
    options = ("--baseline", models[1], *sample, "--save-baseline", tmp_path / "base")
    result = qtool_json("eval", "kl", models[1], *options)
    assert (result["kl_mean"], result["kl_max"], result["same_top"], result["perplexity_ratio"]) == (0, 0, 1, 1)
    again = qtool_json("eval", "kl", models[1], "--baseline-logits", tmp_path / "base", *sample)
    assert abs(again["kl_max"]) < (RANGE / MAX_CODE) ** 2 + 1e-6  # and float32's own rounding
    assert (again["same_top"], again["perplexity_ratio"], again["perplexity_ratio_error"]) == (1, 1, 0)


@pytest.mark.parametrize("options", [("--protocol", "llama.cpp"), ("--stride", 20)])
def test_every_protocol(models, sample, tmp_path, options):
    """The saved rows are those of the scored tokens alone."""
    saved = tmp_path / "base"
    result = qtool_json("eval", "kl", models[0], "--baseline", models[1], *sample, *options, "--save-baseline", saved)
    again = qtool_json("eval", "kl", models[0], "--baseline-logits", saved, *sample, *options)
    assert load_file(saved)["codes"].shape == (result["tokens"], 260)
    assert again["kl_mean"] == pytest.approx(result["kl_mean"], rel=1e-3)
    assert again["perplexity_ratio"] == result["perplexity_ratio"]


# ---- the saved baseline


def test_a_saved_baseline_changes_next_to_nothing(models, sample, direct):
    """Exactly nothing in what does not depend on every probability; elsewhere far less than the error bars."""
    result, path = direct
    again = qtool_json("eval", "kl", models[0], "--baseline-logits", path, *sample)
    assert again.keys() == result.keys()
    for key in result.keys() - CLOSE - {"seconds"}:
        assert again[key] == result[key], key
    for key in CLOSE:
        assert again[key] == pytest.approx(result[key], rel=1e-3, abs=1e-6), key


def test_any_cut_of_the_work_reads_the_same_rows(models, sample, direct, monkeypatch):
    want = qtool_json("eval", "kl", models[0], "--baseline-logits", direct[1], *sample)
    monkeypatch.setattr(evaluation, "LOGITS_AT_A_TIME", 7 * 260)
    monkeypatch.setattr(evaluation, "STATES_BYTES", 1)
    got = qtool_json("eval", "kl", models[0], "--baseline-logits", direct[1], *sample)
    for name in want.keys() - {"seconds"}:
        assert got[name] == (want[name] if isinstance(want[name], str) else pytest.approx(want[name], rel=1e-4))


def test_the_file_is_a_safetensors_file(tiny_files, models, direct):
    ids = windows_of(tiny_files)[:12]
    base = log_probs(load_reference(models[1]), ids).flatten(0, 1)
    tensors = load_file(direct[1])
    n = 12 * (SEQ_LEN - 1)
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "codes": ("uint16", (n, 260)),
        "low": ("float32", (n,)),
        "step": ("float32", (n,)),
        "nll": ("float32", (n,)),
        "top": ("int32", (n,)),
    }
    plain = tensors["codes"] * tensors["step"][:, None].astype(np.float64) + tensors["low"][:, None]
    assert np.abs(plain - base.numpy()).max() < 1e-4
    assert np.array_equal(tensors["top"], base.argmax(1).numpy())
    assert tensors["nll"] == pytest.approx(-base.gather(1, ids[:, 1:].reshape(-1, 1))[:, 0].numpy(), rel=1e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0, 12), distance=st.floats(0, 2), vocab=st.integers(1, 400))
def test_what_the_codes_lose_is_bounded(seed, spread, distance, vocab):
    """The bound of the module's docstring, with room for float32's rounding of the sums."""
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(5, vocab, generator=rng)
    base = torch.log_softmax(logits, 1)
    model = torch.log_softmax(logits + distance * torch.randn(5, vocab, generator=rng), 1).double()
    codes, low, step = encode(base)
    assert codes.dtype == np.uint16
    assert step.max() <= RANGE / MAX_CODE * 1.001
    got, want = decode(codes, low, step).double(), base.double()
    kept = want > want.max(1, keepdim=True).values - RANGE
    room = 1e-5  # float32 at -100 is rounded to 4e-6
    assert ((got - want).abs()[kept] <= (step[:, None].expand_as(want)[kept] + room)).all()
    kl = (want.exp() * (want - model)).sum(1)
    kl_got = (got.exp() * (got - model)).sum(1)
    lost = RANGE / MAX_CODE
    bound = lost * (want.exp() * (want - model).abs()).sum(1) + lost**2
    assert ((kl - kl_got).abs() <= bound + room).all()


def test_codes_by_hand():
    """Three tokens, from -1 to -9: a step of 8 / 65535. The fourth is more than 32 nats down and comes up to there."""
    codes, low, step = encode(torch.tensor([[-1.0, -5.0, -9.0], [-0.5, -40.0, -2.5]]))
    assert codes.tolist() == [[65535, 32768, 0], [65535, 0, 61439]]
    assert low.tolist() == [-9, -32.5]
    assert step.tolist() == pytest.approx([8 / 65535, 32 / 65535])
    assert decode(np.array([[65535, 65535]], np.uint16), low[:1], step[:1]).exp().tolist() == [[0.5, 0.5]]


def test_equally_likely_tokens():
    even = torch.full((1, 4), -np.log(4.0), dtype=torch.float32)
    assert decode(*encode(even)).numpy() == pytest.approx(even.numpy())


# ---- refused: of something else


def refuse(models, path, sample, *options):
    return refusal("eval", "kl", models[0], "--baseline-logits", path, *sample, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seq-len", 32), "its window length is 48, this run's is 32; give the same --seq-len"),
        (("--max-windows", 3), "its number of windows is 12, this run's is 3; give the same --max-windows"),
        (("--stride", 24), "its stride is 48, this run's is 24; give the same --stride"),
        (("--protocol", "llama.cpp"), "its protocol is gptq, this run's is llama.cpp; give the same --protocol"),
    ],
)
def test_baseline_of_other_windows(models, direct, sample, options, message):
    assert refuse(models, direct[1], sample, *options) == f"{direct[1]}: {message}"


def test_baseline_of_another_text(models, direct, sample, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("another text " * 100)
    theirs = direct[0]["data_sha256"]
    message = refuse(models, direct[1], sample, "--data", other)
    assert re.fullmatch(
        rf"{re.escape(str(direct[1]))}: its text, by its SHA-256, is {theirs}, this run's is [0-9a-f]{{64}}; "
        "give the same --data",
        message,
    )


def test_the_name_of_the_text_does_not_matter(tiny_files, models, direct, sample, tmp_path):
    other = shutil.copy(tiny_files.text, tmp_path / "renamed.txt")
    result = qtool_json("eval", "kl", models[0], "--baseline-logits", direct[1], *sample, "--data", other)
    assert (result["data"], result["kl_mean"]) == ("renamed.txt", pytest.approx(direct[0]["kl_mean"], rel=1e-3))


def test_baseline_of_another_vocabulary(direct, sample, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "vocab_size": 300})
    model = make_model("llama", tmp_path / "other")
    message = refuse([model], direct[1], sample)
    assert message == f"{direct[1]}: its vocabulary is 260, this run's is 300; it is of another model"


def test_baseline_of_another_tokenizer(tiny_files, direct, sample, tmp_path):
    """Two letters change places: the same number of tokens, but other ones."""
    model = shutil.copytree(tiny_files.model("llama"), tmp_path / "other")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refuse([model], direct[1], sample)
    assert message.startswith(f"{direct[1]}: its row of tokens, by its SHA-256, is {direct[0]['tokens_sha256']}, ")
    assert message.endswith("; it is of another model, or its tokenizer was")


# ---- refused: broken


def edit_header(path, change):
    """Write the header anew, as `change` left it; the data stay."""
    raw = path.read_bytes()
    n_bytes = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n_bytes])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n_bytes :])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        b"\x00" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1 << 17) + b"{}" * (1 << 16),
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        struct.pack("<Q", 9) + b'{"a": 1',
        struct.pack("<Q", 60000) + b"[" * 60000,
        struct.pack("<Q", 20) + b'{"__metadata__": [] }',
    ],
)
def test_file_of_something_else(models, sample, tmp_path, content):
    path = tmp_path / "x.logits"
    path.write_bytes(content)
    message = refuse(models, path, sample)
    assert message == f"{path}: not a file that --save-baseline of this version wrote; {AGAIN}"


def test_no_file(models, sample, tmp_path):
    assert refuse(models, tmp_path / "none", sample) == f"{tmp_path}/none: {os.strerror(2)}"
    assert refuse(models, tmp_path, sample) == f"{tmp_path}: {os.strerror(21)}"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].update(format="qtool baseline log-probabilities 2"),
        lambda header: header["codes"].update(shape=[1, 260]),
        lambda header: header["codes"].update(dtype="F16"),
        lambda header: header["low"].update(data_offsets=[0, 1 << 60]),
        lambda header: header.update(more=header["low"]),
        lambda header: {key: value for key, value in header.items() if key != "top"},
    ],
)
def test_header_of_something_else(models, sample, saved, change):
    edit_header(saved, change)
    assert refuse(models, saved, sample) == f"{saved}: not a file that --save-baseline of this version wrote; {AGAIN}"


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "None"), (7, "7"), (["x"] * 999, None), ("x" * 999, "x" * 80), ("a\nb\x1b[2J", None)]
)
def test_hostile_metadata_is_shown_on_one_short_line(models, sample, saved, value, shown):
    edit_header(saved, lambda header: header["__metadata__"].update(protocol=value))
    message = refuse(models, saved, sample)
    assert message.isprintable()
    assert len(message) < len(str(saved)) + 200
    assert shown is None or f"its protocol is {shown}, this run's is gptq" in message


@pytest.mark.parametrize("change", [-1, 1, -5000])
def test_truncated_or_longer_file(models, sample, saved, change):
    size = saved.stat().st_size
    os.truncate(saved, size + change)
    message = refuse(models, saved, sample)
    assert message == f"{saved}: has {size + change} bytes, not the {size} of its header; {AGAIN}"


def test_file_cut_inside_its_header(models, sample, saved):
    os.truncate(saved, 300)
    assert "not a file that --save-baseline" in refuse(models, saved, sample)


@pytest.mark.parametrize("place", [-1, -50_000, -12 * (SEQ_LEN - 1) * 260 * 2 - 1])
def test_one_changed_bit(models, sample, saved, place):
    """In the codes, and in the columns before them."""
    raw = bytearray(saved.read_bytes())
    raw[place] ^= 1
    saved.write_bytes(raw)
    message = refuse(models, saved, sample)
    assert message == f"{saved}: damaged, its bytes are not those of its SHA-256; {AGAIN}"


def test_no_sha256(models, sample, saved):
    edit_header(saved, lambda header: header["__metadata__"].update(sha256=None))
    assert "damaged" in refuse(models, saved, sample)


def test_file_that_is_cut_while_it_is_read(models, sample, saved, monkeypatch):
    size, read = saved.stat().st_size, qtool.logits_file.SavedBaseline.read

    def cut_first(self, n_rows):
        os.truncate(saved, size // 2)
        return read(self, n_rows)

    monkeypatch.setattr(qtool.logits_file.SavedBaseline, "read", cut_first)
    assert "damaged" in refuse(models, saved, sample)


# ---- refused: options and places


def test_no_baseline(models, sample):
    message = refusal("eval", "kl", models[0], *sample)
    assert message == "--baseline: none given; give the model to compare with, or --baseline-logits FILE"


def test_two_baselines(models, sample, direct):
    message = refuse(models, direct[1], sample, "--baseline", models[1])
    assert message == f"--baseline-logits {direct[1]}: stands for --baseline {models[1]}; give one of the two"


def test_saving_what_is_saved(models, sample, direct):
    message = refuse(models, direct[1], sample, "--save-baseline", "b")
    assert message == f"--save-baseline b: --baseline-logits {direct[1]} is saved already; give a --baseline"


def save(models, sample, path):
    return refusal("eval", "kl", models[0], "--baseline", models[1], *sample, "--save-baseline", path)


def test_output_that_exists(models, sample, tmp_path):
    path = tmp_path / "there"
    path.write_text("mine")
    message = save(models, sample, path)
    assert message == f"--save-baseline {path}: exists already; use it by --baseline-logits, or give another name"
    assert path.read_text() == "mine"


def test_output_without_a_folder(models, sample, tmp_path):
    message = save(models, sample, tmp_path / "no" / "b")
    assert message == f"--save-baseline {tmp_path}/no/b: its folder does not exist; make it first"


def test_too_little_space(models, sample, direct, tmp_path, monkeypatch):
    """What is asked for is what the file takes."""
    size = direct[1].stat().st_size
    monkeypatch.setattr("qtool.logits_file.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, size - 1))
    message = save(models, sample, tmp_path / "b")
    assert message == (
        f"--save-baseline {tmp_path}/b: takes {format_bytes(size)}, {format_bytes(size - 1)} are free there; "
        "make room, or give a smaller --max-windows"
    )
    monkeypatch.setattr("qtool.logits_file.shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, size))
    options = ("--baseline", models[1], *sample, "--save-baseline", tmp_path / "b")
    assert run_qtool("eval", "kl", models[0], *options).exit_code == 0


def test_disk_that_fills_up(models, sample, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("qtool.logits_file.os.fsync", full)
    message = save(models, sample, tmp_path / "b")
    assert message == f"{tmp_path}/b: {os.strerror(28)}; nothing was left behind, make room and run again"
    assert os.listdir(tmp_path) == []


def test_interrupted_run_leaves_nothing(models, sample, tmp_path, monkeypatch):
    calls = []

    def interrupt(*args):
        calls.append(os.listdir(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "token_scores", interrupt)
    assert save(models, sample, tmp_path / "b") == "interrupted; nothing was left behind"
    assert len(calls[0]) == 1  # it was there
    assert os.listdir(tmp_path) == []


def test_baseline_with_another_vocabulary(tiny_files, models, sample, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], "vocab_size": 300})
    message = refusal("eval", "kl", models[0], "--baseline", make_model("llama", tmp_path / "other"), *sample)
    assert message == "model and baseline have vocabularies of 260 and 300 tokens: not the same model"


# ---- printed


def test_text_says_what_json_says(models, direct, sample):
    text = run_qtool("eval", "kl", models[0], "--baseline", models[1], *sample).stdout
    result = direct[0]
    for name, style in (("perplexity", ".4f"), ("baseline_perplexity", ".4f"), ("perplexity_ratio", ".4f"),
                        ("kl_mean", ".5f"), ("same_top", ".2%")):  # fmt: skip
        assert f"{result[name]:{style}} +/- {result[f'{name}_error']:{style}}" in text
    for name in ("kl_p50", "kl_p95", "kl_p99", "kl_max"):
        assert f"{result[name]:.5f}" in text
    assert f"SHA-256 {result['data_sha256']}" in text
    assert "protocol    gptq, BOS: none\n" in text
    assert f"windows     12 of 48 tokens, {12 * 47} scored" in text
    assert text.startswith("PPL = ")
    assert "(standard errors over windows)" in text


def test_one_token_has_no_error_bar(models, tiny_files):
    options = ("--baseline", models[1], "--data", tiny_files.text, "--seq-len", 2, "--max-windows", 1)
    result = qtool_json("eval", "kl", models[0], *options)
    assert result["tokens"] == 1
    assert not [name for name in result if name.endswith("_error")]
    text = run_qtool("eval", "kl", models[0], *options).stdout
    assert f"PPL = {result['perplexity']:.4f}  (" in text
