"""A tokenizer with code of its own: run for who asks for it when compressing, never in the file."""

from __future__ import annotations

import json
import shutil

import pytest
from invoke import qtool_json, refusal, run_qtool

from formats.reader import QtmFile

OWN_CLASS = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, *args, **kwargs):
        encoded = super()._encode_plus(*args, **kwargs)
        {change}
        return encoded
"""


@pytest.fixture
def make(tiny_files, tmp_path):
    """A model whose tokenizer has a class of its own, and the file that its code leaves behind."""

    def model(change="pass"):
        marker, folder = tmp_path / "code-was-run", tmp_path / "model"
        shutil.copytree(tiny_files.model("llama"), folder)
        (folder / "tokenization_own.py").write_text(OWN_CLASS.format(marker=str(marker), change=change))
        path = folder / "tokenizer_config.json"
        auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        config = json.loads(path.read_text()) | {"tokenizer_class": "OwnTokenizer", "auto_map": auto_map}
        path.write_text(json.dumps(config))
        return folder, marker

    return model


def test_it_is_not_run_unless_asked_for(make, tiny_files, tmp_path):
    model, marker = make()
    command = ["compress", model, "-o", tmp_path / "out.qtm", *tiny_files.compress_options()]
    expected = "it is code of its own; read that, and if you trust it, run it by compress --trust-remote-code"
    assert refusal(*command).endswith(expected)
    assert refusal(*command, "--dry-run").endswith(expected)
    assert refusal("eval", "perplexity", model, "--data", tiny_files.text).endswith(expected)
    assert not marker.exists()


def test_the_file_needs_none_of_it(make, tiny_files, tmp_path):
    model, marker = make()
    output = tmp_path / "out.qtm"
    result = run_qtool("compress", model, "-o", output, *tiny_files.compress_options(), "--trust-remote-code")
    assert result.exit_code == 0, result.output
    assert marker.exists()
    marker.unlink()
    with QtmFile.open(output) as file:
        assert not [name for name in file.files if name.endswith(".py")]
        assert "auto_map" not in json.loads(file.read_file("tokenizer_config.json"))
    plain = tiny_files.compressed("llama")
    expected = qtool_json("eval", "perplexity", plain, "--data", tiny_files.text, "--seq-len", 64)["perplexity"]
    found = qtool_json("eval", "perplexity", output, "--data", tiny_files.text, "--seq-len", 64)["perplexity"]
    assert found == expected
    result = run_qtool("verify", output, "--against", model, "--calibration", tiny_files.text)
    assert "the errors of 21 layers are as recorded" in result.stdout
    assert not marker.exists()


def test_a_tokenizer_that_is_nothing_without_its_code_is_refused(make, tiny_files, tmp_path):
    model, _ = make(change="encoded['input_ids'] = encoded['input_ids'][:-1]")
    command = ["compress", model, "-o", tmp_path / "out.qtm", *tiny_files.compress_options(), "--trust-remote-code"]
    assert refusal(*command).endswith(
        "works by its own code alone, which a file never holds; give the model a tokenizer.json that needs none"
    )
    assert not (tmp_path / "out.qtm").exists()
