"""Everything a user can get wrong ends in one line that names it, and leaves no file behind."""

import errno
import json
import os
import shutil

import pytest
import tiny
import torch
from invoke import refusal, run_qtool
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import make_model

import formats.writer
import qtool as api
import qtool.pipeline
from formats.errors import FormatError
from formats.reader import QtmFile
from formats.section import part_arrays
from formats.writer import Writer

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_files, tmp_path):
    """A Llama of one's own, to break."""
    return shutil.copytree(tiny_files.model("llama"), tmp_path / "model")


@pytest.fixture
def refuse(tiny_files, tmp_path):
    """The line that `qtool compress MODEL OPTIONS` is refused with; nothing may be left in the output's folder."""
    folder = tmp_path / "outputs"
    folder.mkdir()

    def run(path, *options):
        message = refusal("compress", path, "-o", folder / "out.qtm", *tiny_files.compress_options(*options))
        assert list(folder.iterdir()) == []
        return message

    return run


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(model, change):
    tensors = load_file(model / WEIGHTS)
    change(tensors)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


# ---- the model


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/at/all.gguf", "model.qtm"])
def test_path_that_does_not_exist(refuse, name):
    assert refuse(name) == f"{name}: no such file or folder; a model of the hub is named org/name"


def test_file_that_is_no_model(refuse, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    assert refuse(path) == f"{path}: neither a model folder nor a .gguf or .qtm file"


def test_folder_that_is_no_model(refuse, tmp_path):
    assert refuse(tmp_path) == f"{tmp_path}: not a model folder (no config.json in it); give the one that has it"


@pytest.mark.parametrize("text", ["", "{", "\xff", "[1]", '"llama"'])
def test_config_that_is_no_json_object(refuse, model, text):
    (model / "config.json").write_text(text, encoding="latin-1")
    message = refuse(model)
    assert message.startswith(f"{model}/config.json: not ")
    assert "JSON" in message


def test_config_without_model_type(refuse, model):
    (model / "config.json").write_text("{}")
    message = refuse(model)
    assert str(model) in message
    assert "no model_type" in message


def test_unknown_model_type(refuse, model):
    edit_config(model, model_type="nonesuch")
    message = refuse(model)
    assert str(model) in message
    assert "model_type='nonesuch'" in message


def test_model_type_that_generates_nothing(refuse, model):
    edit_config(model, model_type="vit")
    assert "model_type='vit': no causal language model can be built" in refuse(model)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 5},
        {"hidden_size": "x"},
        {"hidden_act": "nonesuch"},
        {"rope_parameters": {"rope_type": "zz", "rope_theta": 1e4}},
        {"intermediate_size": -1},
        {"dtype": "foo"},
    ],
)
def test_config_that_makes_no_sense(refuse, model, change):
    edit_config(model, **change)
    message = refuse(model)
    assert str(model) in message
    assert "model_type='llama'" in message
    assert len(message) < 500


@pytest.mark.parametrize("method", ["gptq", "awq", None])
def test_model_that_is_quantized_already(refuse, model, method):
    edit_config(model, quantization_config={"quant_method": method} if method else {})
    message = f"{model}: already quantized ({method or 'unknown'}); give the original model, or qtool import it"
    assert refuse(model) == message


def test_missing_shard(refuse, tmp_path):
    model = make_model("llama", tmp_path / "sharded", max_shard_size="20KB")
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    message = refuse(model)
    assert message.startswith(f"{model}: shard {shard.name} named in model.safetensors.index.json is missing")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}'])
def test_index_that_is_none(refuse, model, text):
    (model / "model.safetensors.index.json").write_text(text)
    message = refuse(model)
    assert message.startswith(f"{model}/model.safetensors.index.json: not a safetensors index")


def test_shard_outside_the_folder(refuse, model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model/model.safetensors"}}')
    assert "shard ../model/model.safetensors named in model.safetensors.index.json is missing" in refuse(model)


@pytest.mark.parametrize("kept", [0, 4, 300, 0.5, 0.999])
def test_truncated_weights(refuse, model, kept):
    """Cut in the length, in the header and in the data."""
    path = model / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    assert refuse(model).startswith(f"{path}: truncated or not a safetensors file")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_missing_tensor(refuse, model, name):
    edit_weights(model, lambda tensors: tensors.pop(name))
    assert refuse(model).startswith(f"{model}: tensor {name} is missing from the weights")


def test_tensor_of_another_shape(refuse, model):
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_weights(model, lambda tensors: tensors.update({name: torch.zeros(8, 32)}))
    message = refuse(model)
    assert message == (
        f"{model}: tensor {name} has shape [8, 32], the model's config implies [16, 32]; the two are not of one model"
    )


@pytest.mark.parametrize("changes", [{"intermediate_size": 96}, {"hidden_size": 64}, {"num_hidden_layers": 4}])
def test_file_whose_config_is_of_another_model(tiny_files, tmp_path, changes):
    """Every checksum is right, and yet the tensors do not fit the model."""
    path = tmp_path / "other.qtm"
    with QtmFile.open(tiny_files.compressed("llama")) as file, formats.writer.Writer(path) as writer:
        for t in file.header.tensors:
            writer.add_tensor(t.name, t.shape, t.encoding, file.section(t), transposed=t.transposed)
        for f in file.header.files:
            writer.add_file(f.name, file.section(f))
        description = dict(file.header.model) | {"config": dict(file.header.model["config"]) | changes}
        writer.finish(model=description, recipe={}, provenance={}, quality={})
    message = refusal("generate", path, "--prompt", "a")
    assert message.startswith(f"{path}: tensor ")
    message = evaluate(path, tiny_files, "--seq-len", 64)
    assert message.startswith(f"{path}: tensor ")
    assert "implies" in message or "missing" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weight_that_is_not_finite(refuse, model, name, value):
    edit_weights(model, lambda tensors: tensors[name][3].fill_(value))
    assert refuse(model).startswith(f"{model}: weight {name} has NaN or infinite values")


def test_only_pickled_weights(refuse, model):
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    message = refuse(model)
    assert message.startswith(f"{model}: no model.safetensors and no index of shards in it")
    assert "convert them to safetensors" in message


def test_no_weights(refuse, model):
    (model / WEIGHTS).unlink()
    assert refuse(model) == f"{model}: no model.safetensors and no index of shards in it"


def test_no_tokenizer(refuse, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert refuse(model).startswith(f"{model}: no tokenizer in it (tokenizer.json")


@pytest.mark.parametrize("text", ["", "{}", '{"model": {}}'])
def test_broken_tokenizer(refuse, model, text):
    (model / "tokenizer.json").write_text(text)
    assert refuse(model).startswith(f"{model}: its tokenizer cannot be loaded: ")


def test_activation_that_overflows(refuse, model):
    """Finite weights, but x xᵀ is beyond float32."""
    edit_weights(model, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(1e30))
    message = refuse(model)
    expected = "model.layers.1.self_attn.q_proj: 256 of 256 tokens reach this layer with NaN or infinite activations"
    assert message == f"{expected}, more than 1%; the model overflows"


def test_evaluating_a_model_that_overflows(model, tiny_files):
    edit_weights(model, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(1e30))
    message = refusal("eval", "perplexity", model, "--data", tiny_files.text, "--seq-len", 64)
    assert message.startswith(f"{model}: model.layers.1: NaN or infinite activations")


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 0.2, 0.5, 0.999])
def test_truncated_gguf(refuse, tiny_files, tmp_path, kept):
    from tiny_gguf import write_gguf

    path = write_gguf(tiny_files.model("llama"), tmp_path / "whole.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    assert refuse(path).startswith(f"{path}: truncated or not a GGUF file that can be read")


def test_gguf_that_is_none(refuse, tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("a text, not a model " * 100)
    assert refuse(path).startswith(f"{path}: truncated or not a GGUF file that can be read")


# ---- the options


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--bits", "1", "bits=1: must be 2 to 8"),
        ("--bits", "9", "bits=9: must be 2 to 8"),
        ("--group-size", "0", "group_size=0: must be -1 (one group per row) or at least 8"),
        ("--group-size", "4", "group_size=4: must be -1 (one group per row) or at least 8"),
        ("--group-size", "-2", "group_size=-2: must be -1 (one group per row) or at least 8"),
        ("--percdamp", "0", "percdamp=0.0: must be above 0 and below 10"),
        ("--percdamp", "nan", "percdamp=nan: must be above 0 and below 10"),
        ("--embeddings", "9", "embeddings=9: must be 2 to 8 bits, or 16 to leave them as they are"),
        ("--samples", "0", "samples=0: must be at least 1"),
        ("--seq-len", "1", "seq_len=1: must be at least 2"),
        ("--seed", "-1", "seed=-1: must not be negative"),
        ("--method", "magic", "method='magic': must be one of gptq, rtn, int8, spqr, ternary"),
    ],
)
def test_option_out_of_range(refuse, tiny_files, option, value, message):
    assert refuse(tiny_files.model("llama"), option, value) == message


@pytest.mark.parametrize("args", [("--bits", "four"), ("--colour", "red"), ("--to", "dense")])
def test_option_that_cannot_be_parsed(tiny_files, tmp_path, args):
    result = run_qtool("compress", tiny_files.model("llama"), "-o", tmp_path / "out.qtm", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert args[0] in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_empty_calibration_text(refuse, tiny_files, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    message = refuse(tiny_files.model("llama"), "--calibration", str(path))
    assert message == f"{path}: there is no text in it; give one that has some"


def test_calibration_text_shorter_than_a_window(refuse, tiny_files, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only 19 characters.")
    message = refuse(tiny_files.model("llama"), "--calibration", str(path))
    assert message == (
        f"{path}: the text has 19 tokens and one window needs 64; give more text or a smaller --seq-len"
    )  # fmt: skip


def test_calibration_text_that_does_not_exist(refuse, tiny_files):
    message = refuse(tiny_files.model("llama"), "--calibration", "nowhere.txt")
    assert message == "nowhere.txt: this path does not exist; give .txt, .jsonl, .parquet or a folder"


# ---- the output


def test_output_exists(tiny_files, output):
    output.write_bytes(b"precious")
    arguments = ("compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options())
    assert refusal(*arguments) == f"{output}: exists already; give another --output or --force"
    assert output.read_bytes() == b"precious"
    assert run_qtool(*arguments, "--force").exit_code == 0
    assert output.read_bytes() == tiny_files.compressed("llama").read_bytes()
    assert os.listdir(output.parent) == [output.name]


def test_forced_run_that_fails_leaves_the_old_file(tiny_files, model, output):
    output.write_bytes(b"precious")
    edit_weights(model, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].fill_(float("nan")))
    message = refusal("compress", model, "-o", output, *tiny_files.compress_options("--force"))
    assert "model.layers.2.mlp.down_proj.weight" in message
    assert os.listdir(output.parent) == [output.name]
    assert output.read_bytes() == b"precious"


def test_output_that_is_a_folder(tiny_files, output):
    output.mkdir()
    message = refusal("compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options("--force"))
    assert message.startswith(f"{output}: ")
    assert list(output.iterdir()) == []
    assert os.listdir(output.parent) == [output.name]


def test_output_in_a_folder_that_does_not_exist(tiny_files, tmp_path):
    output = tmp_path / "nowhere" / "out.qtm"
    message = refusal("compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options())
    assert message.startswith(f"{output}: its folder does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_disk_full(refuse, tiny_files, monkeypatch, number):
    """The second section is one too many."""
    appended = []
    append = formats.writer.Writer._append

    def full(writer, data, n_bytes):
        appended.append(n_bytes)
        if len(appended) > 1:
            raise OSError(number, os.strerror(number))
        return append(writer, data, n_bytes)

    monkeypatch.setattr(formats.writer.Writer, "_append", full)
    message = refuse(tiny_files.model("llama"))
    assert message.endswith(f"out.qtm: {os.strerror(number)}; nothing was left behind, make room and run again")


# ---- the other commands


def evaluate(path, tiny_files, *options):
    return refusal("eval", "perplexity", path, "--data", tiny_files.text, *options)


def test_baseline_with_another_vocabulary(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, "llama", {**tiny.FAMILIES["llama"], "vocab_size": 300})
    other = make_model("llama", tmp_path / "other")
    message = evaluate(tiny_files.compressed("mistral"), tiny_files, "--baseline", other)
    assert message == "model and baseline have vocabularies of 260 and 300 tokens: not the same model"


@pytest.mark.parametrize("seq_len", [129, 1, 0, -5])
def test_window_that_the_model_cannot_take(tiny_files, seq_len):
    message = evaluate(tiny_files.model("llama"), tiny_files, "--seq-len", seq_len)
    assert message == f"--seq-len {seq_len}: must be 2 to 128, the context the model was built for"


def test_no_windows(tiny_files):
    message = evaluate(tiny_files.model("llama"), tiny_files, "--seq-len", 64, "--max-windows", 0)
    assert message == "--max-windows 0: must be at least 1"


def test_evaluation_text_shorter_than_a_window(tiny_files, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("only 19 characters.")
    message = refusal("eval", "perplexity", tiny_files.model("llama"), "--data", path)
    assert "the text has 19 tokens and one window needs 128" in message


def test_generate_from_nothing(tiny_files):
    message = refusal("generate", tiny_files.compressed("llama"), "--prompt", "")
    assert message == "--prompt: has no tokens in it; give some text"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generate_beyond_the_context(tiny_files, family):
    """A table of positions ends there; rotary positions go on, into what the model never saw."""
    message = refusal("generate", tiny_files.compressed(family), "--prompt", "a" * 120, "--max-new-tokens", 9)
    assert message == (
        "--max-new-tokens 9: with the 120 tokens of the prompt that is more than the model's context of 128"
    )
    done = run_qtool("generate", tiny_files.compressed(family), "--prompt", "a" * 120, "--max-new-tokens", 8)
    assert done.exit_code == 0, done.output


def test_export_to_a_full_disk(tiny_files, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("formats.export.folder.save_file", full)
    message = refusal("export", tiny_files.compressed("llama"), "--to", "dense", "-o", tmp_path / "dense")
    assert message.startswith(f"{tmp_path}/dense: cannot be written (")
    assert "No space left on device" in message
    assert list(tmp_path.iterdir()) == []


def test_generate_from_a_folder(tiny_files):
    folder = tiny_files.model("llama")
    assert refusal("generate", folder, "--prompt", "a") == f"{folder}: a folder; give a .qtm file"


def test_export_to_a_folder_that_exists(tiny_files, tmp_path):
    file, folder = tiny_files.compressed("llama"), tmp_path / "dense"
    folder.mkdir()
    (folder / "notes").write_text("precious")
    arguments = ("export", file, "--to", "dense", "-o", folder)
    assert refusal(*arguments) == f"{folder}: exists already; give another folder or --force"
    assert "is not a model folder and is not replaced, even with --force" in refusal(*arguments, "--force")
    assert [path.name for path in folder.iterdir()] == ["notes"]
    (folder / "notes").rename(folder / "config.json")
    assert run_qtool(*arguments, "--force").exit_code == 0
    assert (folder / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_export_never_replaces_the_working_directory(tiny_files, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    message = refusal("export", tiny_files.compressed("llama"), "--to", "dense", "-o", ".", "--force")
    assert "holds the working directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_export_over_a_file(tiny_files, tmp_path):
    """--force replaces folders; a file of that name is a mistake."""
    path = tmp_path / "dense"
    path.write_text("precious")
    message = refusal("export", tiny_files.compressed("llama"), "--to", "dense", "-o", path, "--force")
    assert message.startswith(f"{path}: ")
    assert path.read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


def test_export_that_fails_leaves_nothing(tiny_files, tmp_path):
    damaged = tmp_path / "damaged.qtm"
    damaged.write_bytes(flipped(tiny_files.compressed("llama"), "tokenizer.json"))
    refusal("export", damaged, "--to", "dense", "-o", tmp_path / "dense")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.qtm"]


# ---- files of ours that are damaged


COMMANDS = {
    "inspect": (),
    "verify": (),
    "generate": ("--prompt", "a"),
    "export": ("--to", "dense", "-o", "unused"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_file_that_is_none_of_ours(tmp_path, command):
    path = tmp_path / "other.qtm"
    path.write_bytes(b"not one of ours" * 1000)
    message = refusal(command, path, *COMMANDS[command])
    assert message.startswith(f"{path}: ")
    assert "SPEC" in message


@pytest.mark.parametrize("command", COMMANDS)
def test_file_that_does_not_exist(tmp_path, command):
    path = tmp_path / "nowhere.qtm"
    assert refusal(command, path, *COMMANDS[command]).lower() == f"{str(path).lower()}: no such file" + (
        "; give a .qtm file" if command == "generate" else " or directory"
    )


@pytest.mark.parametrize("command", ["inspect", "verify", "generate"])
@pytest.mark.parametrize("kept", [0, 10, 100, 0.5, 0.999])
def test_truncated_file(tiny_files, tmp_path, command, kept):
    whole = tiny_files.compressed("llama").read_bytes()
    path = tmp_path / "cut.qtm"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    assert refusal(command, path, *COMMANDS[command]).startswith(f"{path}: ")


def flipped(path, name):
    """The bytes of `path` with one bit changed in the middle of a section."""
    with QtmFile.open(path) as file:
        section = (file.tensors | file.files)[name]
    data = bytearray(path.read_bytes())
    data[section.offset_bytes + section.n_bytes // 2] ^= 4
    return bytes(data)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "tokenizer.json"],
)
def test_flipped_bit_is_found_in_its_section(tiny_files, tmp_path, name):
    path = tmp_path / "flipped.qtm"
    path.write_bytes(flipped(tiny_files.compressed("llama"), name))
    message = refusal("verify", path)
    assert message.startswith(f"{path}: ")
    assert repr(name) in message
    assert "does not match its SHA-256" in message
    assert repr(name) in refusal("generate", path, "--prompt", "a")
    assert run_qtool("inspect", path).exit_code == 0  # which reads the header alone
    with pytest.raises(FormatError, match=name):
        api.load_tokenizer(path) if name == "tokenizer.json" else api.load(path)


def test_flipped_bit_stops_an_evaluation(tiny_files, tmp_path):
    path = tmp_path / "flipped.qtm"
    path.write_bytes(flipped(tiny_files.compressed("llama"), "model.layers.1.mlp.up_proj.weight"))
    assert "'model.layers.1.mlp.up_proj.weight'" in evaluate(path, tiny_files, "--seq-len", 64)


def test_flipped_bit_anywhere_is_found(tiny_files, tmp_path):
    data = tiny_files.compressed("llama").read_bytes()
    path = tmp_path / "flipped.qtm"
    for at in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        assert run_qtool("verify", path).exit_code == 1, at


# ---- models and files that do not fit together


def test_tokenizer_of_another_model(refuse, model):
    """Its ids reach beyond the embedding."""
    edit_config(model, vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    edit_weights(model, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].clone()}))
    message = refuse(model)
    assert "its tokenizer gives id " in message
    assert "the model has 100 tokens; give the model its own tokenizer" in message


def test_a_weight_beyond_fp16_scales_names_the_layer(refuse, model):
    edit_weights(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e9))
    message = refuse(model, "--method", "rtn")
    assert message == "model.layers.1.mlp.up_proj.weight: a scale is NaN or infinite (SPEC 7.6)"


def test_a_compressed_file_is_not_compressed_again(refuse, tiny_files):
    file = tiny_files.compressed("llama")
    assert refuse(file) == f"{file}: already compressed; give the original model"


def test_spec_7_6_a_load_refuses_an_infinite_scale(tiny_files, tmp_path):
    """The checksums are right: only the check at decoding can see it."""
    path = tmp_path / "bad.qtm"
    with QtmFile.open(tiny_files.compressed("llama")) as file, Writer(path) as writer:
        for entry in file.tensors.values():
            section = bytearray(file.section(entry))
            if entry.name == "model.layers.0.mlp.up_proj.weight":
                part_arrays(section, entry.shape, entry.encoding)["scales"][3, 0] = float("inf")
            writer.add_tensor(entry.name, entry.shape, entry.encoding, section)
        for name in file.files:
            writer.add_file(name, file.read_file(name))
        header = file.header
        writer.finish(model=header.model, recipe={}, provenance={}, quality={})
    message = refusal("generate", path, "--prompt", "a")
    assert "tensor 'model.layers.0.mlp.up_proj.weight': a scale is NaN or infinite (SPEC 7.6)" in message
