"""What is scored: each protocol against plain transformers, position by position, and by hand."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke import qtool_json, refusal, run_qtool
from tiny import SIZES, load_reference

from calibration.corpus import Text
from qtool.checkpoint import open_checkpoint
from qtool.errors import ConfigError
from qtool.numerics import exact_float32
from qtool.protocol import LEAST_STRETCHES, Protocol, added_bos, cut_windows, scored

BOS = SIZES["bos_token_id"]


@pytest.fixture
def with_bos(tiny_files, tmp_path):
    """The tiny Llama with a tokenizer that starts every text with <s>."""
    return add_bos(shutil.copytree(tiny_files.model("llama"), tmp_path / "with_bos"))


def add_bos(model):
    path = model / "tokenizer.json"
    start, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    return model


@pytest.fixture(scope="module")
def tokenizer(tiny_files):
    """One token a byte, and no BOS."""
    return open_checkpoint(str(tiny_files.model("llama"))).tokenizer()


def ids_of(tokenizer, text):
    """The ids of a text, letter by letter, so that nothing in it is a special token."""
    return [tokenizer(letter).input_ids[0] for letter in text]


@torch.no_grad()
def nll_of(model, window, target):
    """-log p(window[target] | window[:target]) in float64, from the logits of the position before it."""
    with exact_float32():
        logits = model(torch.tensor([window])).logits[0].double()
    return -torch.log_softmax(logits[target - 1], -1)[window[target]].item()


def perplexity_of(nlls):
    """With llama.cpp's error: that of a mean of independent values, times the perplexity."""
    n, mean, squares = len(nlls), sum(nlls) / len(nlls), sum(v * v for v in nlls) / len(nlls)
    return np.exp(mean), np.sqrt((squares - mean**2) / (n - 1)) * np.exp(mean)


# ---- against plain transformers


@pytest.mark.parametrize(("seq_len", "scored_targets"), [(32, range(17, 32)), (33, range(17, 33)), (3, range(2, 3))])
@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_is_the_second_half_of_every_window(tiny_files, tokenizer, with_bos, seq_len, scored_targets, bos):
    """The tokens behind seq_len // 2 + 1, each window's first token replaced by BOS where the tokenizer adds one."""
    folder = with_bos if bos else tiny_files.model("llama")
    model, ids = load_reference(folder), ids_of(tokenizer, tiny_files.text.read_text()[:300])
    row = [BOS, *ids] if bos else ids
    nlls = []
    for start in range(0, 4 * seq_len, seq_len):
        window = row[start : start + seq_len]
        nlls += [nll_of(model, [BOS, *window[1:]] if bos else window, target) for target in scored_targets]
    options = ("--data", tiny_files.text, "--max-windows", 4, "--protocol", "llama.cpp", "-c", seq_len)
    result = qtool_json("eval", "perplexity", folder, *options)
    value, error = perplexity_of(nlls)
    assert result["perplexity"] == pytest.approx(value, rel=1e-5)
    assert result["perplexity_error"] == pytest.approx(error, rel=1e-4)
    assert result["tokens"] == 4 * len(scored_targets) == 4 * (seq_len - seq_len // 2 - 1)
    assert (result["protocol"], result["error_over"]) == ("llama.cpp", "tokens")
    assert result["bos"] == ("every window" if bos else "none")


def test_the_bos_of_llama_cpp_changes_the_result(tiny_files, with_bos):
    """So that the test above can tell."""
    options = ("--data", tiny_files.text, "--max-windows", 4, "--protocol", "llama.cpp", "-c", 32)
    without, has = (qtool_json("eval", "perplexity", path, *options) for path in (tiny_files.model("llama"), with_bos))
    assert without["perplexity"] != pytest.approx(has["perplexity"], rel=1e-3)
    assert without["tokens_sha256"] != has["tokens_sha256"]


@pytest.mark.parametrize("stride", [1, 17, 47, 48])
def test_stride_scores_the_last_tokens_of_every_later_window(tiny_files, tokenizer, stride):
    """As transformers' guide to perplexity: what the window before did not score."""
    model, ids, seq_len, n_windows = (
        load_reference(tiny_files.model("llama")),
        ids_of(tokenizer, tiny_files.text.read_text()[:300]),
        48,
        4,
    )
    nlls, end_before = [], 0
    for start in range(0, n_windows * stride, stride):
        window = ids[start : start + seq_len]
        new = start + seq_len - end_before
        nlls += [nll_of(model, window, target) for target in range(max(seq_len - new, 1), seq_len)]
        end_before = start + seq_len
    options = ("--data", tiny_files.text, "--max-windows", n_windows, "--seq-len", seq_len, "--stride", stride)
    result = qtool_json("eval", "perplexity", tiny_files.model("llama"), *options)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(nlls)), rel=1e-5)
    assert (result["tokens"], result["windows"], result["stride"]) == (len(nlls), n_windows, stride)


@pytest.mark.parametrize("bos", [False, True])
def test_gptq_has_bos_where_the_tokenizer_puts_it(tiny_files, tokenizer, with_bos, bos):
    folder = with_bos if bos else tiny_files.model("llama")
    model, ids = load_reference(folder), ids_of(tokenizer, tiny_files.text.read_text()[:300])
    row = [BOS, *ids] if bos else ids
    nlls = [nll_of(model, row[start : start + 32], target) for start in (0, 32) for target in range(1, 32)]
    options = ("--data", tiny_files.text, "--seq-len", 32, "--max-windows", 2)
    result = qtool_json("eval", "perplexity", folder, *options)
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(nlls)), rel=1e-5)
    assert (result["protocol"], result["bos"]) == ("gptq", "start of the text" if bos else "none")


# ---- by hand


def text_of(content):
    return Text([content], "0" * 64, "hand.txt")


def windows_of(tokenizer, content, longest=128, **protocol):
    return cut_windows(text_of(content), tokenizer, Protocol(**protocol), longest=longest, source="hand.txt")


def scored_tokens(tokenizer, windows):
    """For every window, its scored tokens as text."""
    masks = scored(windows.first, windows.ids.shape[1])
    return [tokenizer.decode(ids[1:][mask]) for ids, mask in zip(windows.ids, masks, strict=True)]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ({"seq_len": 4}, ["bcd", "fgh"]),
        ({"seq_len": 4, "stride": 4}, ["bcd", "fgh"]),
        ({"seq_len": 4, "stride": 3}, ["bcd", "efg", "hij"]),
        ({"seq_len": 4, "stride": 2}, ["bcd", "ef", "gh", "ij"]),
        ({"seq_len": 4, "stride": 2, "max_windows": 2}, ["bcd", "ef"]),
        ({"seq_len": 8, "stride": 1}, ["bcdefgh", "i", "j"]),
        ({"seq_len": 4, "name": "llama.cpp"}, ["d", "h"]),
        ({"seq_len": 5, "name": "llama.cpp"}, ["de", "ij"]),
        ({"seq_len": 10, "name": "llama.cpp"}, ["ghij"]),
    ],
)
def test_scored_tokens_known_answer(tokenizer, protocol, expected):
    windows = windows_of(tokenizer, "abcdefghij", **protocol)
    assert scored_tokens(tokenizer, windows) == expected
    assert windows.sample.tokens == sum(map(len, expected))


def test_special_tokens_in_the_text_are_text_to_llama_cpp(tokenizer):
    text = "a</s>bcdefgh"
    assert windows_of(tokenizer, text, seq_len=4).ids[0].tolist()[1] == SIZES["eos_token_id"]
    windows = windows_of(tokenizer, text, seq_len=6, name="llama.cpp")
    assert windows.ids[0].tolist() == ids_of(tokenizer, "a</s>b")


def test_what_counts_as_a_bos_that_is_added(tiny_files, tokenizer, with_bos):
    assert added_bos(tokenizer) is None
    assert added_bos(open_checkpoint(str(with_bos)).tokenizer()) == BOS
    without = open_checkpoint(str(tiny_files.model("llama"))).tokenizer()
    without.bos_token = None
    assert added_bos(without) is None


@settings(deadline=None)
@given(seq_len=st.integers(2, 12), n_tokens=st.integers(12, 60), data=st.data())
def test_with_a_stride_every_token_is_scored_once(tokenizer, seq_len, n_tokens, data):
    stride = data.draw(st.integers(1, seq_len - 1))
    text = "".join(chr(33 + i) for i in range(n_tokens))  # every token names its place
    windows = windows_of(tokenizer, text, seq_len=seq_len, stride=stride)
    tokens = "".join(scored_tokens(tokenizer, windows))
    assert tokens == text[1 : 1 + len(tokens)]
    assert n_tokens - 1 - len(tokens) < stride  # the tail that fills no window
    assert all(first + 1 >= seq_len - stride for first in windows.first[1:].tolist())  # tokens before the scored ones


def test_overlapping_windows_are_no_copies(tokenizer):
    windows = windows_of(tokenizer, "abcdefghij" * 9, seq_len=64, stride=1)
    assert windows.ids.untyped_storage().nbytes() == 8 * 90


@pytest.mark.parametrize(
    ("name", "longest", "expected"),
    [("gptq", None, 2048), ("gptq", 8192, 2048), ("gptq", 99, 99), ("llama.cpp", None, 512), ("llama.cpp", 99, 99)],
)  # fmt: skip
def test_default_window(name, longest, expected):
    assert Protocol(name=name).window_length(longest) == expected


# ---- what the error is taken over


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ({"seq_len": 3}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]),
        ({"seq_len": 4, "stride": 2, "max_windows": 20}, [0] * 5 + [k for k in range(1, 10) for _ in "1234"]),
    ],
)  # fmt: skip
def test_stretches_known_answer(tokenizer, protocol, expected):
    """As long as a window each, however the windows overlap."""
    windows = windows_of(tokenizer, "a" * 60, **({"max_windows": LEAST_STRETCHES} | protocol))
    assert windows.stretches().tolist() == expected
    assert len(expected) == windows.sample.tokens


@pytest.mark.parametrize("protocol", [{"max_windows": LEAST_STRETCHES - 1}, {"name": "llama.cpp"}])
def test_no_stretches(tokenizer, protocol):
    assert windows_of(tokenizer, "a" * 60, seq_len=3, **protocol).stretches() is None


# ---- refused


@pytest.mark.parametrize("seq_len", [2, 1, 0, -5, 129])
def test_window_in_which_llama_cpp_scores_nothing(tiny_files, seq_len):
    options = ("--data", tiny_files.text, "--protocol", "llama.cpp", "-c", seq_len)
    message = refusal("eval", "perplexity", tiny_files.model("llama"), *options)
    assert message == f"--seq-len {seq_len}: must be 3 to 128, the context the model was built for"


@pytest.mark.parametrize("stride", [0, -1, 65])
def test_stride_that_is_none(tiny_files, stride):
    options = ("--data", tiny_files.text, "--seq-len", 64, "--stride", stride)
    message = refusal("eval", "perplexity", tiny_files.model("llama"), *options)
    assert message == f"--stride {stride}: must be 1 to 64, the tokens in a window"


def test_stride_is_not_for_llama_cpp():
    message = "--stride 8: windows of --protocol llama.cpp stand side by side; use --protocol gptq"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        Protocol(name="llama.cpp", stride=8)


def test_stride_and_llama_cpp_on_the_command_line(tiny_files):
    message = refusal("eval", "perplexity", tiny_files.model("llama"), "--protocol", "llama.cpp", "--stride", 512)
    assert message.startswith("--stride 512: ")


def test_unknown_protocol(tiny_files):
    result = run_qtool("eval", "perplexity", tiny_files.model("llama"), "--protocol", "hf")
    assert result.exit_code == 2
    assert "'hf' is not one of 'gptq', 'llama.cpp'" in result.stderr
