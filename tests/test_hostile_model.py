"""Well-formed `.qtm` files, with right hashes, hostile in what they hand to transformers (SPEC 3.4.1, 6.3)."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from invoke import refusal, run_qtool
from transformers import AutoTokenizer

from formats.embedded import load_tokenizer
from formats.errors import FormatError
from formats.loader import load
from formats.reader import QtmFile, verify
from formats.skeleton import MAX_DERIVED_BYTES, build_skeleton, config_from_dict, without_references
from formats.writer import Writer

EVIL = "import pathlib; pathlib.Path({marker!r}).touch()\nclass Evil: pass\n"
AUTO_MAP = {
    "AutoConfig": "tokenization_evil.Evil",
    "AutoModelForCausalLM": "tokenization_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    "AutoProcessor": "tokenization_evil.Evil",
}


@pytest.fixture
def llama(tiny_files) -> Path:
    return tiny_files.compressed("llama")


def forge(source: Path, target: Path, *, files: dict[str, bytes] | None = None, **members: Any) -> Path:
    """The file with other embedded files and free objects, as a liar would write it: all hashes are right."""
    with QtmFile.open(source) as file, Writer(target) as writer:
        for entry in file.tensors.values():
            writer.add_tensor(entry.name, entry.shape, entry.encoding, file.section(entry))
        for name, data in ({name: file.read_file(name) for name in file.files} if files is None else files).items():
            writer.add_file(name, data)
        known = {name: getattr(file.header, name) for name in ("model", "recipe", "provenance", "quality")}
        writer.finish(**(known | members))
    return target


def rewrite(source: Path, target: Path, files: dict[str, bytes] | None = None, **config: Any) -> Path:
    """The file with some embedded files and members of the config changed."""
    with QtmFile.open(source) as file:
        known = {name: file.read_file(name) for name in file.files}
        model = dict(file.header.model) | {"config": file.header.model["config"] | config}
    return forge(source, target, files=known | (files or {}), model=model)


def tokenizer_config(path: Path, **changes: Any) -> dict[str, bytes]:
    with QtmFile.open(path) as file:
        values = json.loads(file.read_file("tokenizer_config.json"))
    return {"tokenizer_config.json": json.dumps(values | changes).encode()}


# ---- a bit anywhere


def test_a_flipped_bit_anywhere_stops_a_load_and_names_the_section(llama, tmp_path):
    data = bytearray(llama.read_bytes())
    with QtmFile.open(llama) as file:
        sections = file.header.sections()
    places = [(8, "preamble"), (63, "preamble"), (len(data) - 2, "header")]
    end = 64
    for section in sections:
        places += [(at, f"{section.label}: the padding before it") for at in range(end, section.offset_bytes)][:1]
        end = section.offset_bytes + section.n_bytes
        places.append((section.offset_bytes + section.n_bytes // 2, section.label))
    assert sum("padding" in name for _, name in places) > 3
    for at, name in places:
        (tmp_path / "flipped.qtm").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for read in (load, verify):
            with pytest.raises(FormatError) as caught:
                read(tmp_path / "flipped.qtm")
            assert name in str(caught.value) and "(SPEC " in str(caught.value)


# ---- code


def test_spec_6_3_no_code_of_a_file_is_run(llama, tmp_path, tiny_files, monkeypatch):
    """Named in every way that transformers knows, and lying where the process looks for modules."""
    marker = tmp_path / "it-ran"
    evil = EVIL.format(marker=str(marker)).encode()
    (tmp_path / "tokenization_evil.py").write_bytes(evil)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    files = {name: evil for name in ("tokenization_evil.py", "configuration_evil.py", "modeling_evil.py")}
    files |= tokenizer_config(llama, auto_map=AUTO_MAP, processor_class="Evil", trust_remote_code=True)
    files |= {name: json.dumps({"auto_map": AUTO_MAP}).encode() for name in ("processor_config.json", "config.json")}
    path = rewrite(llama, tmp_path / "a.qtm", files, auto_map=AUTO_MAP, trust_remote_code=True)
    load(path)
    assert load_tokenizer(path)("the").input_ids
    assert run_qtool("generate", path, "--prompt", "the", "--max-new-tokens", "1").exit_code == 0
    done = run_qtool("eval", "perplexity", path, "--data", tiny_files.text, "--seq-len", "64", "--max-windows", "1")
    assert done.exit_code == 0, done.output
    assert not marker.exists()


def test_the_code_would_run_if_it_were_trusted(llama, tmp_path, monkeypatch):
    """So that the test above can fail."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    marker, folder = tmp_path / "it-ran", tmp_path / "folder"
    folder.mkdir()
    files = tokenizer_config(llama, auto_map=AUTO_MAP)
    for name, data in (files | {"tokenization_evil.py": EVIL.format(marker=str(marker)).encode()}).items():
        (folder / name).write_bytes(data)
    with suppress(Exception):  # Evil is no tokenizer, but by then it is too late
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_spec_3_4_1_code_is_not_run_for_a_config_inside_a_config(llama, tmp_path):
    inner = {"model_type": "evil", "auto_map": AUTO_MAP}
    path = forge(llama, tmp_path / "a.qtm", files={}, model={"config": {"model_type": "llava", "text_config": inner}})
    with pytest.raises(FormatError, match=r"header: model: model_type='llava': .*\(SPEC 3.4.1\)"):
        load(path)
    assert without_references([{"text_config": inner}]) == [{"text_config": {"model_type": "evil"}}]


@pytest.mark.parametrize("name", ["AutoProcessor", "AutoProcessorFastFast", "AutoTokenizer", "pipeline", "Trainer"])
def test_spec_6_3_a_tokenizer_class_that_is_none(llama, tmp_path, name):
    """AutoProcessor would ask whether to run the code that processor_config.json names; AutoTokenizer never ends."""
    message = rf"tokenizer_class '{name}' is no tokenizer \(SPEC 6.3\)"
    by_file = rewrite(llama, tmp_path / "a.qtm", tokenizer_config(llama, tokenizer_class=name))
    with pytest.raises(FormatError, match=rf"a.qtm: tokenizer_config.json: {message}"):
        load_tokenizer(by_file)
    by_config = rewrite(llama, tmp_path / "b.qtm", tokenizer_class=name)
    with pytest.raises(FormatError, match=rf"b.qtm: config.json: {message}"):
        load_tokenizer(by_config)


def test_spec_6_3_a_tokenizer_class_nobody_knows_is_read_without_it(llama, tmp_path):
    path = rewrite(llama, tmp_path / "a.qtm", tokenizer_config(llama, tokenizer_class="EvilTokenizer"))
    assert load_tokenizer(path)("the").input_ids


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "gguf_file", "vocab", "sp_model_kwargs"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_spec_6_3_no_other_file_is_read(llama, tmp_path, monkeypatch, key, name):
    """Not even opened: a reader that names it in an error would have told that it exists."""
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    value = {"model_file": str(secret)} if key == "sp_model_kwargs" else str(secret)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer_config.json": json.dumps(plain).encode()} | {name: json.dumps(plain | {key: value}).encode()}
    path = rewrite(llama, tmp_path / "a.qtm", files)
    opened: list[str] = []
    monkeypatch.setattr("builtins.open", spy(open, opened))
    assert load_tokenizer(path)("the").input_ids
    assert opened and str(secret) not in opened


def spy(function: Any, seen: list[str]) -> Any:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(str(path))
        return function(path, *args, **kwargs)

    return call


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_spec_3_4_1_a_kernel_on_the_hub_is_not_fetched(llama, tmp_path, key):
    path = rewrite(llama, tmp_path / "a.qtm", **{key: "evil/kernel"})
    ids = torch.tensor([[1, 2]])
    assert torch.equal(load(path)(ids).logits, load(llama)(ids).logits)


# ---- what is missing or wrong


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"header: model: config is None: must be an object \(SPEC 3.3\)"),
        ({"config": []}, r"header: model: config is \[\]: must be an object \(SPEC 3.3\)"),
        ({"config": {}}, r"header: model: .*no model_type.*\(SPEC 3.4.1\)"),
        ({"config": {"model_type": "x" * 1000}}, r"header: model: model_type='x{70,80}\.\.\.: .*\(SPEC 3.4.1\)"),
        ({"config": {"model_type": "llama", "hidden_size": "a"}}, r"header: model: .*\(SPEC 3.4.1\)"),
        (
            {"config": {"model_type": "llama", "num_hidden_layers": 10**6}},
            "num_hidden_layers=1000000, but the file has",
        ),
        ({"config": {"model_type": "gpt2", "n_layer": 2**62}}, "n_layer=4611686018427387904, but the file has"),
        ({"config": {"model_type": "llama", "text_config": {"num_layers": 10**9}}}, "num_layers=1000000000, but"),
        ({"config": {"model_type": "llama", "num_labels": 10**9}}, r"num_labels=1000000000, but.*\(SPEC 3.4.1\)"),
        ({"config": {"model_type": "llama", "head_dim": 10**10, "num_hidden_layers": 1}}, r"header: .*\(SPEC 3.4.1\)"),
        ({"config": {"model_type": "gptj", "n_positions": 10**9, "n_layer": 1}}, r"header: .*\(SPEC 3.4.1\)"),
        ({"config": {"model_type": "bert", "num_hidden_layers": 1}}, r"has no such tensor \(SPEC 3.4.1\)"),
        ({"config": {"model_type": "clip"}}, r"header: .*'clip': no causal language model.*\(SPEC 3.4.1\)"),
        ({"config": {"model_type": "t5", "num_layers": 1}}, r"has no such tensor \(SPEC 3.4.1\)"),
        ({"config": {"model_type": "t5", "num_decoder_layers": 10**9}}, "num_decoder_layers=1000000000, but the file"),
        ({"config": {"model_type": "switch_transformers", "num_experts": 10**9}}, "num_experts=1000000000, but the"),
        ({"config": {"model_type": "mixtral", "num_local_experts": 10**9}}, "num_local_experts=1000000000, but the"),
    ],
)
def test_spec_3_4_1_a_config_that_does_not_fit(llama, tmp_path, model, message):
    path = forge(llama, tmp_path / "a.qtm", files={}, model=model)
    with pytest.raises(FormatError, match=f"a.qtm: .*{message}"):
        load(path)


def test_tables_of_a_config_are_bounded():
    config = {"model_type": "gptj", "n_layer": 1, "n_embd": 32, "n_head": 4, "rotary_dim": 4, "vocab_size": 8}
    build_skeleton(config_from_dict(config | {"n_positions": 4096}))
    with pytest.raises(FormatError, match=f"implies tables of .* at most {MAX_DERIVED_BYTES}"):
        build_skeleton(config_from_dict(config | {"n_positions": 10**8}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, r"tensor 'model.layers.2.*': the model's config has no such tensor \(SPEC 3.4.1\)"),
        (
            {"num_hidden_layers": 4},
            r"tensor 'model.layers.3.*' is missing; the model's config implies it \(SPEC 3.4.1\)",
        ),
        (
            {"intermediate_size": 10**15},
            r"tensor 'model.layers.0.*': the model's config implies shape .*\(SPEC 3.4.1\)",
        ),
    ],
)
def test_spec_3_4_1_tensors_that_the_config_does_not_describe(llama, tmp_path, change, message):
    with pytest.raises(FormatError, match=f"a.qtm: {message}"):
        load(rewrite(llama, tmp_path / "a.qtm", **change))


@pytest.mark.parametrize("name", ["model.forward", "config.weight", "model..weight", "model.layers.0.mlp", "lm_head.x"])
def test_spec_3_4_1_a_tensor_that_names_something_else(llama, tmp_path, name):
    path = tmp_path / "a.qtm"
    with QtmFile.open(llama) as file, Writer(path) as writer:
        entry = file.tensors["model.norm.weight"]
        writer.add_tensor(name, entry.shape, entry.encoding, file.section(entry))
        for i in range(3):
            writer.add_tensor(f"{i}", entry.shape, entry.encoding, file.section(entry))
        writer.finish(model=file.header.model, recipe={}, provenance={}, quality={})
    with pytest.raises(FormatError, match=rf"tensor '{name}': the model's config has no such tensor \(SPEC 3.4.1\)"):
        load(path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 10**5, b"1" * 5000])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
def test_spec_6_3_an_embedded_file_that_is_no_json(llama, tmp_path, name, data):
    path = rewrite(llama, tmp_path / "a.qtm", {name: data})
    with pytest.raises(FormatError, match=rf"a.qtm: file '{name}': .*\(SPEC (6.3|3.3)\)"):
        load(path) if name == "generation_config.json" else load_tokenizer(path)


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 10**5, b'{"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}'])
def test_spec_6_3_a_tokenizer_that_cannot_be_loaded(llama, tmp_path, data):
    path = rewrite(llama, tmp_path / "a.qtm", {"tokenizer.json": data})
    with pytest.raises(FormatError, match=r"a.qtm: its tokenizer cannot be loaded: .*\(SPEC 6.3\)"):
        load_tokenizer(path)


def test_spec_6_3_a_generation_config_that_transformers_refuses(llama, tmp_path):
    path = rewrite(llama, tmp_path / "a.qtm", {"generation_config.json": b'{"watermarking_config": 1}'})
    with pytest.raises(FormatError, match=r"a.qtm: file 'generation_config.json': .*\(SPEC 6.3\)"):
        load(path)


# ---- the commands that read the free objects


@pytest.mark.parametrize(
    "members",
    [
        {"recipe": {"linears": 1}},
        {"recipe": {"calibration": {"source": 1}}},
        {"recipe": {"calibration": [1]}},
        {"quality": {"mean_relative_error": "small"}},
        {"quality": {"harder_damped": 1}},
        {"quality": {"dropped_tokens": [1]}},
    ],
)
def test_inspect_of_free_objects_that_are_not_ours(tiny_files, tmp_path, members):
    path = forge(tiny_files.compressed("llama"), tmp_path / "a.qtm", **members)
    message = refusal("inspect", path)
    assert message.startswith("header: recipe or quality are not as qtool writes them: ")
    assert message.endswith("(SPEC 3.4)")
    assert run_qtool("inspect", path, "--json").exit_code == 0


def test_inspect_prints_nothing_that_drives_a_terminal(tiny_files, tmp_path):
    path = forge(tiny_files.compressed("llama"), tmp_path / "a.qtm", model={"model_type": "\x1b[2Jllama"})
    assert "\x1b" not in run_qtool("inspect", path).stdout


@pytest.mark.parametrize("model", [{}, {"config": 1}, {"config": {"model_type": "llama", "num_hidden_layers": 10**9}}])
@pytest.mark.parametrize(
    "command", [("eval", "perplexity"), ("export", "--to", "dense", "-o", "out"), ("generate", "--prompt", "x")]
)
def test_every_command_refuses_a_config_that_is_none(tiny_files, tmp_path, monkeypatch, model, command):
    monkeypatch.chdir(tmp_path)
    path = forge(tiny_files.compressed("llama"), tmp_path / "a.qtm", model=model)
    words = [*command[:2], path, *command[2:]] if command[0] == "eval" else [command[0], path, *command[1:]]
    assert "header: model" in refusal(*words)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.qtm"]


@pytest.mark.parametrize(
    "calibration", [1, {}, {"source": "builtin", "size": 1}, {"source": "builtin", "samples": "8"}]
)
def test_verify_against_a_recipe_that_is_not_ours(tiny_files, tmp_path, calibration):
    path = forge(tiny_files.compressed("llama"), tmp_path / "a.qtm", recipe={"calibration": calibration})
    message = refusal("verify", path, "--against", tiny_files.model("llama"))
    assert message.endswith("header: recipe.calibration is not as qtool writes it (SPEC 3.4)")
