"""`export --to gptq|compressed-tensors|awq`: another reader decodes what the file holds; what cannot be is refused."""

import json
import os

import numpy as np
import pytest
import torch
from independent_layouts import decode_awq, decode_gptq, decode_pack_quantized, read_folder
from invoke import qtool_json, refusal, run_qtool
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtool
from formats.block_lists import BlockLists
from formats.embedded import model_config
from formats.encoding import Dense
from formats.export import engine
from formats.export import folder as export_folder
from formats.export.published import published_rows
from formats.reader import QtmFile
from formats.skeleton import build_skeleton
from formats.tensors import decode_tensor
from formats.writer import Writer

DECODE = {"gptq": decode_gptq, "compressed-tensors": decode_pack_quantized, "awq": decode_awq}
PACKED = {"gptq": ".qweight", "compressed-tensors": ".weight_packed", "awq": ".qweight"}


def export(file, to, folder, *options):
    return qtool_json("export", file, "--to", to, "-o", folder, *options)


def expected(file):
    """Published module -> its weight [out, in] f32, and all tensors that are no quantized linear of a block."""
    with QtmFile.open(file) as opened:
        model, lists = build_skeleton(model_config(opened)), BlockLists.of(opened.header.model, opened.tensors)
        packed = [n for n in opened.tensors if lists.number(n) is not None]
        packed = [n for n in packed if opened.tensors[n].encoding.name != "dense"]
        weights = {name: opened.layer(name).dequantize() for name in packed}
        published = published_rows(model, {name: len(weight) for name, weight in weights.items()})
        linears = {
            name.removesuffix(".weight"): weights[part.name] if part.rows is None else weights[part.name][part.rows]
            for name, part in published.items()
        }
        others = {n: decode_tensor(opened, e) for n, e in opened.tensors.items() if n not in weights}
    return linears, others


def decoded(to, folder):
    config, tensors = read_folder(folder)
    modules = [name.removesuffix(PACKED[to]) for name in tensors if name.endswith(PACKED[to])]
    return {module: DECODE[to](config, module, tensors) for module in modules}, tensors


MIXED = ("--layer", "down_proj=8", "--layer", "layers.1.*(q|k|v)_proj=3", "--ignore", "layers.0.*up_proj")


@pytest.mark.parametrize(
    ("to", "family", "options"),
    [
        ("gptq", "llama", ("--sym",)),
        ("gptq", "llama", ("--bits", "2", "--group-size", "-1")),
        ("gptq", "qwen2", ("--bits", "3", "--embeddings", "16")),
        ("gptq", "mixtral", ("--bits", "8")),
        ("gptq", "gpt2", ()),
        ("gptq", "phi3", ("--bits", "5", "--sym")),  # in 8 bits
        ("gptq", "llama", MIXED),
        ("compressed-tensors", "llama", ("--sym", "--group-size", "-1")),
        ("compressed-tensors", "llama", ("--sym", "--bits", "5", *MIXED)),
        ("compressed-tensors", "mixtral", ("--sym", "--bits", "8", "--embeddings", "16")),
        ("awq", "llama", ()),
        ("awq", "mixtral", ("--sym", "--bits", "3")),  # in 4 bits
    ],
)
def test_decodes_to_what_the_file_holds(tiny_files, to, family, options, tmp_path):
    file = tiny_files.wide(family, *options)
    report = export(file, to, tmp_path / "out")
    assert report["losses"] == []
    linears, others = expected(file)
    found, tensors = decoded(to, tmp_path / "out")
    assert found.keys() == linears.keys()
    for module, weight in linears.items():
        assert np.array_equal(found[module], weight), module
    for name, value in others.items():
        if family != "mixtral" or not name.endswith("mlp.gate.weight"):  # on disk, block_sparse_moe.gate
            assert torch.equal(tensors[name].float(), value), name


def test_a_router_has_its_published_name_and_is_said_to_be_dense(tiny_files, tmp_path):
    file = tiny_files.wide("mixtral", "--sym", "--bits", "8", "--embeddings", "16")
    for to, members in (("gptq", "dynamic"), ("compressed-tensors", "ignore")):
        export(file, to, tmp_path / to)
        config, tensors = read_folder(tmp_path / to)
        assert "model.layers.1.block_sparse_moe.gate.weight" in tensors
        assert "block_sparse_moe" in str(config[members]) and "gate" in str(config[members])


def test_gptq_says_what_differs_from_most(tiny_files, tmp_path):
    """By names that are whole, and by the name that vLLM has for three of them."""
    export(tiny_files.wide("llama", *MIXED), "gptq", tmp_path / "out")
    config, _ = read_folder(tmp_path / "out")
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, False)
    of = {values.get("bits"): pattern for pattern, values in config["dynamic"].items()}
    assert of[8].startswith("+:") and "model\\.layers\\.2\\.mlp\\.down_proj" in of[8]
    assert "qkv_proj" in of[3] and "qkv_proj" not in of[8]
    assert of[None] == "-:^(?:model\\.layers\\.0\\.mlp\\.up_proj)$"
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config


@pytest.mark.parametrize(
    ("options", "dtype"), [((), "float32"), (("--embeddings", "16"), "float32"), (("--dtype", "float16"), "float16")]
)
def test_dtype_is_the_least_that_is_exact(tiny_files, options, dtype, tmp_path):
    """An embedding of 8 bits decodes to more digits than 16 bits have."""
    chosen = ("--lossy", *options) if "--dtype" in options else ()
    file = tiny_files.wide("llama", "--sym", *(() if chosen else options))
    report = export(file, "gptq", tmp_path / "out", *chosen)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert bool(report["losses"]) == bool(chosen)
    assert {loss["reason"] for loss in report["losses"]} <= {"values beyond float16"}


def test_tokenizer_comes_along(tiny_files, tmp_path):
    export(tiny_files.wide("llama", "--sym"), "compressed-tensors", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the one").input_ids


def test_shards_have_an_index(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setattr(export_folder, "MAX_SHARD_BYTES", 60_000)
    file = tiny_files.wide("llama", "--sym")
    names = export(file, "gptq", tmp_path / "out")["files"]
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    found, tensors = decoded("gptq", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert all(np.array_equal(found[module], weight) for module, weight in expected(file)[0].items())


@pytest.mark.parametrize(
    ("options", "to", "said"),
    [
        (("--input-scales",), "gptq", "input scales (21 tensors)"),
        (("--outliers", "1%"), "gptq", "outliers (21 tensors)"),
        (("--stat-bits", "3"), "awq", "statistics in two levels (21 tensors)"),
        (("--format", "nf4"), "gptq", "weights stored as codebook (21 tensors)"),
        ((), "compressed-tensors", "zeros (21 tensors)"),
        (("--bits", "8"), "awq", "8 bits (21 tensors)"),
    ],
)
def test_what_would_be_lost_is_said_and_needs_lossy(tiny_files, options, to, said, tmp_path):
    file = tiny_files.wide("llama", *options)
    message = refusal("export", file, "--to", to, "-o", tmp_path / "out")
    assert f"cannot hold {said}; --lossy rounds them again, which adds an error of up to " in message
    assert os.listdir(tmp_path) == []
    report = export(file, to, tmp_path / "out", "--lossy")
    assert len(report["losses"]) == 21
    found, _ = decoded(to, tmp_path / "out")
    linears, _ = expected(file)
    for loss in report["losses"]:
        module = loss["name"].removesuffix(".weight")
        difference = np.square(found[module] - linears[module], dtype=np.float64).sum()
        error = difference / np.square(linears[module], dtype=np.float64).sum()
        assert 0 < error < 0.05
        assert loss["error"] == pytest.approx(error, rel=1e-4)
    worst = max(report["losses"], key=lambda loss: loss["error"])
    assert f"up to {100 * worst['error']:.3g}% ({worst['name']})" in message


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_rows_without_groups_are_rounded_in_groups(tiny_files, to, tmp_path, monkeypatch):
    """16 equal steps for a whole row lose more."""
    file = tiny_files.wide("llama", "--format", "nf4", "--group-size", "-1")
    by_group = [loss["error"] for loss in export(file, to, tmp_path / "groups", "--lossy")["losses"]]
    monkeypatch.setattr(engine, "common_group_size", lambda encodings: -1)
    by_row = [loss["error"] for loss in export(file, to, tmp_path / "rows", "--lossy")["losses"]]
    sizes = [read_folder(tmp_path / name)[0]["group_size"] for name in ("groups", "rows")]
    assert sizes == [32, -1]  # rows of 64 and 96
    assert len(by_group) == 21 and sum(by_group) < 0.9 * sum(by_row)


def test_minima_from_gguf_are_rounded_in_their_own_groups(tiny_files, tmp_path):
    gguf, file = tmp_path / "model.gguf", tmp_path / "model.qtm"
    qtool_json("export", tiny_files.wide("llama"), "--to", "gguf", "--gguf-type", "q4_1", "--lossy", "-o", gguf)
    qtool_json("import", gguf, "-o", file)
    report = export(file, "awq", tmp_path / "out", "--lossy")
    config, _ = read_folder(tmp_path / "out")
    assert (config["group_size"], config["zero_point"]) == (32, True)
    assert len(report["losses"]) == 21 and max(loss["error"] for loss in report["losses"]) < 0.003


@pytest.mark.parametrize("options", [("--bits", "4"), ("--bits", "8", "--group-size", "-1"), MIXED], ids=" ".join)
@pytest.mark.filterwarnings("ignore")
def test_transformers_runs_compressed_tensors_as_we_do(tiny_files, options, tmp_path):
    file = tiny_files.wide("llama", "--sym", *options)
    export(file, "compressed-tensors", tmp_path / "out")
    ids = torch.arange(40)[None] % 250
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(theirs, qtool.load(file)(ids).logits, rtol=0, atol=1e-4)


def test_version_1_of_gptq_needs_lossy_where_a_zero_is_0(tiny_files, tmp_path):
    """Some weights of a tiny model are all of one sign within a group."""
    file = tiny_files.wide("llama", "--group-size", "8", "--bits", "2")
    message = refusal("export", file, "--to", "gptq", "--gptq-version", "1", "-o", tmp_path / "out")
    assert "gptq version 1 cannot hold zeros below 1" in message
    report = export(file, "gptq", tmp_path / "out", "--gptq-version", "1", "--lossy")
    assert {loss["reason"] for loss in report["losses"]} == {"zeros below 1"}
    found, _ = decoded("gptq", tmp_path / "out")
    linears, _ = expected(file)
    lost = {loss["name"].removesuffix(".weight") for loss in report["losses"]}
    assert {module for module in linears if not np.array_equal(found[module], linears[module])} == lost


def test_version_1_of_gptq_is_exact_where_no_zero_is_0(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--sym")
    assert export(file, "gptq", tmp_path / "out", "--gptq-version", "1")["losses"] == []
    found, _ = decoded("gptq", tmp_path / "out")
    assert all(np.array_equal(found[module], weight) for module, weight in expected(file)[0].items())


def test_losses_are_printed(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--outliers", "1%")
    lines = run_qtool("export", file, "--to", "gptq", "-o", tmp_path / "out", "--lossy").stdout.splitlines()
    assert "model.layers.0.self_attn.q_proj.weight: outliers, error " in "\n".join(lines)
    assert lines[-1].startswith("21 tensors were rounded again, ")


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("gptq", "k_proj.weight': 16 outputs: gptq has multiples of 32 only; compress with --ignore"),
        ("compressed-tensors", "down_proj.weight': 80 inputs: compressed-tensors has whole groups only, not of 32"),
        ("awq", "down_proj.weight': 80 inputs: awq has whole groups only, not of 32"),
    ],
)
def test_a_shape_that_the_engine_refuses(tiny_files, to, said, tmp_path):
    file = tiny_files.compressed("llama", "--no-input-scales", "--sym", "--group-size", "32")
    message = refusal("export", file, "--to", to, "-o", tmp_path / "out", "--lossy")
    assert message.endswith(said)
    assert os.listdir(tmp_path) == []


def test_awq_has_one_group_size(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--group-size", "96")  # hidden rows of 64 are shorter
    message = refusal(
        "export", tiny_files.wide("llama", "--bits", "3"), "--to", "awq", "--gptq-version", "2", "-o", "x"
    )
    assert message == "--gptq-version 2: is for --to gptq; leave it out"
    assert export(file, "awq", tmp_path / "out")["losses"] == []  # a short row is one group either way


def test_experts_that_are_published_as_one_tensor(tiny_files, tmp_path):
    file = tiny_files.compressed("granitemoe", "--no-input-scales")
    message = refusal("export", file, "--to", "gptq", "-o", tmp_path / "out")
    assert "is one tensor for all experts, of which other engines load no codes" in message


def test_nothing_quantized(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--ignore", "proj")
    message = refusal("export", file, "--to", "gptq", "-o", tmp_path / "out")
    assert message.endswith("no linear of its blocks is quantized; export --to dense")


def test_options_of_another_format(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--sym")
    assert "holds everything" in refusal("export", file, "--to", "dense", "-o", tmp_path / "out", "--lossy")
    message = refusal("export", file, "--to", "transformers", "-o", tmp_path / "out", "--dtype", "float16")
    assert "--dtype float16: is not for --to transformers" in message
    message = refusal("export", file, "--to", "awq", "-o", tmp_path / "out", "--gptq-version", "2")
    assert message == "--gptq-version 2: is for --to gptq; leave it out"


def test_a_folder_that_exists_is_left_alone(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--sym")
    export(file, "gptq", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    message = refusal("export", file, "--to", "awq", "-o", tmp_path / "out")
    assert message == f"{tmp_path / 'out'}: exists already; give another folder or --force"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    export(file, "awq", tmp_path / "out", "--force")
    assert read_folder(tmp_path / "out")[0]["quant_method"] == "awq"


@pytest.mark.parametrize("to", ["dense", "transformers", "gptq", "compressed-tensors", "awq", "gguf"])
@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_file_that_is_not_whole_is_not_exported(tiny_files, to, change, tmp_path):
    """As it is not loaded: an engine would make up what is missing."""
    gone, broken = "model.layers.0.mlp.up_proj.weight", tmp_path / "broken.qtm"
    with QtmFile.open(tiny_files.wide("llama", "--sym")) as file, Writer(broken) as writer:
        for name, entry in file.tensors.items():
            if change == "one more" or name != gone:
                writer.add_tensor(name, entry.shape, entry.encoding, file.section(entry))
        if change == "one more":
            writer.add_tensor("nothing.weight", (1, 1), Dense("F16"), bytes(2))
        for name in file.files:
            writer.add_file(name, file.read_file(name))
        header = file.header
        writer.finish(model=header.model, recipe=header.recipe, provenance=header.provenance, quality=header.quality)
    message = refusal("export", broken, "--to", to, "-o", tmp_path / "out")
    wanted = {"one less": f"tensor {gone!r} is missing", "one more": "'nothing.weight': the model's config has no such"}
    assert wanted[change] in message
    assert os.listdir(tmp_path) == ["broken.qtm"]
