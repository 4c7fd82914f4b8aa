"""Every method and format from a model to a file and back, as a user goes: compress, inspect, verify, load, use."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from blockwise import blockwise_logits, some_ids
from invoke import qtool_json, refusal, run_qtool
from safetensors.torch import load_file, save_file
from tiny import load_reference, make_model

import qtool
from formats.reader import QtmFile

INT8 = ("--method", "int8", "--group-size", "-1")
KINDS = {
    "int": ("gptq, int, 4 bits, group size 16, asymmetric, embeddings 8 bits", "uniform", ()),
    "int, rtn": ("rtn, int, 4 bits, group size 16, asymmetric", "uniform", ("--method", "rtn")),
    "statistics": ("group size 16, asymmetric, statistics in 3 bits", "uniform", ("--stat-bits", "3")),
    "statistics, rtn": ("statistics in 4 bits", "uniform", ("--method", "rtn", "--stat-bits", "4")),
    "spqr": ("statistics in 3 bits, outlier threshold 0.2, embed", "uniform", ("--method", "spqr")),
    "outliers": ("asymmetric, 1% outliers, embeddings", "uniform", ("--outliers", "1%", "--effort", "fast")),
    "nf4": ("gptq, nf4, 4 bits, group size 16, scales in 8 bits", "codebook", ("--format", "nf4", "--double-quant")),
    "nf4, rtn": ("rtn, nf4, 4 bits", "codebook", ("--method", "rtn", "--format", "nf4")),
    "nf4, outliers": ("nf4, 4 bits, group size 16, 2% outliers", "codebook",
                      ("--format", "nf4", "--outliers", "0.02", "--effort", "fast")),
    "fp4": ("gptq, fp4, 4 bits", "codebook", ("--format", "fp4", "--effort", "fast")),
    "fp4, rtn": ("rtn, fp4, 4 bits, group size 16, scales in 8 bits", "codebook",
                 ("--method", "rtn", "--format", "fp4", "--double-quant")),
    "fitted": ("gptq, fitted, 3 bits", "codebook", ("--format", "fitted", "--bits", "3", "--effort", "fast")),
    "fitted, rtn": ("rtn, fitted, 3 bits", "codebook", ("--method", "rtn", "--format", "fitted", "--bits", "3")),
    "trellis": ("gptq, trellis, 2 bits, group size 16, outliers where they pay, embeddings", "trellis",
                ("--format", "trellis", "--bits", "2", "--effort", "fast")),
    "trellis, rtn": ("rtn, trellis, 2 bits", "trellis", ("--method", "rtn", "--format", "trellis", "--bits", "2")),
    "int8": ("int8, int, 8 bits, a scale per row, symmetric, inputs from 6 in 16 bits", "int8_rows", INT8),
    "int8, columns": ("2 largest inputs in 16 bits", "int8_rows", (*INT8, "--outlier-features", "2")),
}  # fmt: skip
WITH_OUTLIERS = ("trellis", "spqr", "outliers", "nf4, outliers", "int8, columns")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def file(tiny_files, kind):
    return tiny_files.compressed("llama", *KINDS[kind][2])


def layers(path):
    """The rows of `inspect` that stand for linears of the blocks."""
    return [row for row in qtool_json("inspect", path)["tensors"] if row["relative_error"] is not None]


def test_inspect_says_how_it_was_made(file, kind):
    text, encoding, _ = KINDS[kind]
    (recipe,) = (line for line in run_qtool("inspect", file).stdout.splitlines() if line.startswith("recipe "))
    assert text in recipe and recipe.endswith(", embeddings 8 bits")
    rows = layers(file)
    assert len(rows) == 21 and {row["encoding"] for row in rows} == {encoding}
    assert (sum(row["outliers"] for row in rows) > 0) == (kind in WITH_OUTLIERS)
    most = {"trellis": 0.2, "fitted": 0.08, "int8": 1e-4}.get(kind.split(",")[0], 0.03)
    assert all(0 < row["relative_error"] < most for row in rows)


def test_the_file_is_what_it_says_of_itself(tiny_files, file):
    options = ("--against", tiny_files.model("llama"), "--calibration", tiny_files.text)
    result = run_qtool("verify", file, *options)
    assert result.exit_code == 0 and "the errors of 21 layers are as recorded" in result.stdout, result.output


def test_loaded_and_exported_it_gives_the_same_logits(tiny_files, tmp_path, file):
    ids = some_ids(2)
    assert run_qtool("export", file, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    with torch.no_grad():
        loaded, exported = qtool.load(file)(ids).logits, load_reference(tmp_path / "dense")(ids).logits
    assert torch.allclose(loaded, exported, rtol=1e-4, atol=1e-4)
    assert torch.allclose(blockwise_logits(file, ids), exported, rtol=1e-4, atol=1e-4)
    original = load_reference(tiny_files.model("llama"))(ids).logits
    lost = (exported - original).square().mean() / original.square().mean()
    assert 0 < lost < 0.7


def test_it_can_be_used(tiny_files, file):
    assert run_qtool("generate", file, "--prompt", "the of", "--max-new-tokens", "3").exit_code == 0
    result = qtool_json("eval", "perplexity", file, "--data", tiny_files.text, "--seq-len", "64", "--max-windows", "2")
    assert 1 < result["perplexity"] < 1e6


@pytest.mark.parametrize("kind", ["spqr", "fp4", "fitted, rtn", "trellis", "int8, columns"])
def test_the_second_run_gives_the_same_bytes(tiny_files, tmp_path, file, kind):
    again = tmp_path / "again.qtm"
    command = ["compress", tiny_files.model("llama"), "-o", again, *tiny_files.compress_options(*KINDS[kind][2])]
    assert run_qtool(*command).exit_code == 0
    assert again.read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def changed_model(tmp_path_factory):
    """The llama with one row of one layer changed."""
    model = make_model("llama", tmp_path_factory.mktemp("changed") / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] *= 3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_another_weight_is_told_apart(tiny_files, changed_model, file):
    message = refusal("verify", file, "--against", changed_model, "--calibration", tiny_files.text)
    assert "tensor 'model.layers.1.mlp.down_proj.weight' against" in message and "recorded is" in message


# ---- pictures of it


@pytest.mark.parametrize("kind", ["outliers", "spqr"])
def test_the_page_shows_where_the_outliers_are(tiny_files, tmp_path, kind):
    file = tiny_files.compressed("llama", *KINDS[kind][2])
    most = max(layers(file), key=lambda row: row["outliers"])
    assert run_qtool("inspect", file, "--report", tmp_path / "page.html").exit_code == 0
    text = " ".join(" ".join(ET.parse(tmp_path / "page.html").getroot().itertext()).split())
    rows, columns = most["shape"]
    assert f"{most['outliers']:,} outliers, {most['outliers'] / (rows * columns):.3%} of {rows} × {columns}" in text
    assert most["name"] in text
    with QtmFile.open(file) as opened:
        assert opened.tensors[most["name"]].encoding.outliers == most["outliers"]


def test_a_plot_of_two_kinds(tiny_files, tmp_path):
    files = [tiny_files.compressed("llama", *KINDS[kind][2]) for kind in ("outliers", "trellis")]
    drawn = qtool_json("plot", *files, "-o", tmp_path / "plot.svg")
    text = " ".join(ET.parse(tmp_path / "plot.svg").getroot().itertext())
    for file in files:
        assert file.stem in json.dumps(drawn) and f"{qtool_json('inspect', file)['bits_per_weight']:.4g}" in text


# ---- the log


@pytest.mark.parametrize(
    ("kind", "said"), [("spqr", ("int", 4)), ("fp4, rtn", ("fp4", 4)), ("int8, columns", ("int", 8))]
)
def test_the_log_names_format_and_outliers(tiny_files, tmp_path, kind, said):
    log, output = tmp_path / "run.jsonl", tmp_path / "out.qtm"
    options = tiny_files.compress_options(*KINDS[kind][2], "--log-file", str(log))
    assert run_qtool("compress", tiny_files.model("llama"), "-o", output, *options).exit_code == 0
    lines = {line["layer"]: line for line in map(json.loads, log.read_text().splitlines())}
    for row in layers(output):
        line = lines.pop(row["name"])
        assert (line["format"], line["bits"], line["outliers"]) == (*said, row["outliers"])
    assert not lines
