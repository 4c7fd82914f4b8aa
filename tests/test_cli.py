"""The command line: results on stdout, nothing else there; the same input gives the same bytes."""

import itertools
import json
import math
import os

import click
import pytest
from invoke import ROOT, python, qtool_json, run_qtool

import qtool
from formats.reader import QtmFile
from qtool.cli import main

SAMPLE_KEYS = {
    "model", "data", "data_sha256", "protocol", "bos", "seq_len", "stride", "windows", "tokens", "tokens_sha256",
    "error_over", "seconds",
}  # fmt: skip
PERPLEXITY_KEYS = {"perplexity", "perplexity_error", *SAMPLE_KEYS}
BASELINE_KEYS = {"baseline_perplexity", "kl_mean", "kl_p99", "same_top"}
TENSOR_KEYS = {"name", "shape", "encoding", "bits", "group_size", "outliers", "settings", "bytes", "relative_error"}
INSPECT_KEYS = {"format_version", "file_bytes", "model_type", "parameters", "bits_per_weight", "quantized_share"}


def all_commands(command=main, path=("qtool",)):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from all_commands(child, (*path, name))


def heavy_imports(code, *args):
    """Which of the slow libraries are imported after `code`."""
    report = "import sys; print(sorted({'numpy', 'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    done = python("-c", f"{code}\n{report}", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# ---- what is imported


@pytest.mark.parametrize(
    "code",
    [
        "import qtool",
        "from qtool.cli import main; main(['--help'], standalone_mode=False)",
        "from qtool.cli import main; main(['compress', '--help'], standalone_mode=False)",
    ],
)
def test_help_imports_no_slow_library(code):
    assert heavy_imports(code) == "[]"


@pytest.mark.parametrize(("command", "imported"), [("inspect", "[]"), ("verify", "['numpy']")])
def test_reading_a_file_imports_numpy_at_most(tiny_files, command, imported):
    code = f"import sys; from qtool.cli import main; main(['{command}', sys.argv[1]], standalone_mode=False)"
    assert heavy_imports(code, tiny_files.compressed("llama")) == imported


def test_the_reader_imports_no_slow_library():
    assert heavy_imports("import formats.reader") == "[]"


# ---- help


@pytest.mark.parametrize(("path", "command"), list(all_commands()))
def test_help_has_an_example(path, command):
    result = run_qtool(*path[1:], "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 110
    if not isinstance(command, click.Group) or path == ("qtool",):
        examples = [line for line in result.stdout.splitlines() if line.strip().startswith(" ".join(path) + " ")]
        assert examples, path


def test_every_option_says_what_it_does():
    for path, command in all_commands():
        for option in command.params:
            named = isinstance(option, click.Argument) or option.help or option.name in ("max_new_tokens",)
            assert named, (*path, option.name)


def test_module_is_the_command():
    done = python("-m", "qtool.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"qtool, version {qtool.__version__}\n", "")


def test_nothing_to_do_shows_the_help():
    result = run_qtool()
    assert result.exit_code == 2
    assert "Usage: main [OPTIONS] COMMAND" in result.stderr


# ---- results


@pytest.mark.parametrize("baseline", [False, True])
def test_perplexity_json(tiny_files, baseline):
    options = ("--baseline", tiny_files.model("llama")) if baseline else ()
    file = tiny_files.compressed("llama")
    result = qtool_json("eval", "perplexity", file, "--data", tiny_files.text, "--seq-len", 64, *options)
    assert result.keys() == PERPLEXITY_KEYS | (BASELINE_KEYS if baseline else set())
    assert (result["data"], result["seq_len"]) == ("text.txt", 64)
    assert result["tokens"] == 63 * result["windows"]


def test_inspect_json(tiny_files):
    file = tiny_files.compressed("llama")
    found = qtool_json("inspect", file)
    assert found.keys() >= INSPECT_KEYS | {"tensors", "recipe"}
    assert found["format_version"] == "1.0"
    assert found["file_bytes"] == file.stat().st_size
    assert found["model_type"] == "llama"
    assert found["recipe"]["linears"]["bits"] == 4
    assert (
        found["recipe"]["calibration"] | {"source": "text.txt", "samples": 4, "seq_len": 64, "seed": 0}
        == (found["recipe"]["calibration"])
    )
    for tensor in found["tensors"]:
        assert tensor.keys() == TENSOR_KEYS
        assert (tensor["relative_error"] is None) == (
            tensor["name"].endswith("norm.weight") or "embed" in tensor["name"]
        )
        assert tensor["relative_error"] is None or 0 < tensor["relative_error"] < 0.1


def test_bits_per_weight_counts_every_byte_of_the_block_linears(tiny_files):
    """The bytes are those from one section's start to the next."""
    file = tiny_files.compressed("qwen2")
    found = qtool_json("inspect", file)
    with QtmFile.open(file) as opened:
        starts = sorted(s.offset_bytes for s in opened.header.sections())
        span = dict(itertools.pairwise(starts))
        sizes = {t.name: span[t.offset_bytes] - t.offset_bytes for t in opened.header.tensors}
    assert {t["name"]: t["bytes"] for t in found["tensors"]} == sizes
    linears = [t for t in found["tensors"] if t["name"].startswith("model.layers.") and len(t["shape"]) == 2]
    assert len(linears) == 21
    n_weights = sum(math.prod(t["shape"]) for t in linears)
    assert found["bits_per_weight"] == 8 * sum(t["bytes"] for t in linears) / n_weights
    assert 4 + 16 / 16 < found["bits_per_weight"] < 8


def test_quantized_share_by_hand(tiny_files):
    """A tied Llama of width 32: 260 tokens, three blocks with 4 heads, 2 of them for keys, and 80 inside."""
    linears = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 80 * 32)
    embedding, norms = 260 * 32, 3 * 2 * 32 + 32
    found = qtool_json("inspect", tiny_files.compressed("llama"))
    assert found["parameters"] == linears + embedding + norms
    assert found["quantized_share"] == (linears + embedding) / (linears + embedding + norms)
    found = qtool_json("inspect", tiny_files.compressed("llama", "--embeddings", "16"))
    assert found["quantized_share"] == linears / (linears + embedding + norms)


def test_compress_json(tiny_files, tmp_path):
    options = tiny_files.compress_options()
    result = qtool_json("compress", tiny_files.model("llama"), "-o", tmp_path / "out.qtm", *options)
    found = qtool_json("inspect", tmp_path / "out.qtm")
    for key in ("file_bytes", "parameters", "bits_per_weight", "quantized_share", "quality"):
        assert result[key] == found[key]
    assert result["file"] == str(tmp_path / "out.qtm")
    assert result["left_dense"] == [t["name"] for t in found["tensors"] if t["encoding"] == "dense"]
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 10_000_000


def test_verify_json(tiny_files):
    file = tiny_files.compressed("llama")
    result = qtool_json("verify", file)
    with QtmFile.open(file) as opened:
        n_sections = len(opened.tensors) + len(opened.files)
    assert result == {"file": str(file), "sections": n_sections, "bytes": file.stat().st_size, "ok": True}


def test_export_json(tiny_files, tmp_path):
    result = qtool_json("export", tiny_files.compressed("llama"), "--to", "dense", "-o", tmp_path / "dense")
    assert (result["folder"], result["to"]) == (str(tmp_path / "dense"), "dense")
    assert result["files"] == sorted(os.listdir(tmp_path / "dense"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(result["files"])


def test_text_says_what_json_says(tiny_files):
    file = tiny_files.compressed("llama")
    text, found = run_qtool("inspect", file, "--tensors").stdout, qtool_json("inspect", file)
    assert f"{found['bits_per_weight']:.3f}" in text
    for tensor in found["tensors"]:
        assert tensor["name"] in text
    options = ("--data", tiny_files.text, "--seq-len", 64)
    text = run_qtool("eval", "perplexity", file, "--baseline", tiny_files.model("llama"), *options).stdout
    result = qtool_json("eval", "perplexity", file, "--baseline", tiny_files.model("llama"), *options)
    for value in (result["perplexity"], result["baseline_perplexity"], result["kl_mean"], result["kl_p99"]):
        assert f"{value:.4f}" in text or f"{value:.5f}" in text
    assert result["data_sha256"] in text
    assert text.startswith(
        f"PPL = {result['perplexity']:.4f} +/- {result['perplexity_error']:.4f}  (standard error over"
    )


def test_stderr_is_silent_when_it_is_no_terminal(tiny_files, tmp_path):
    file = tmp_path / "out.qtm"
    runs = [
        ("compress", tiny_files.model("llama"), "-o", file, *tiny_files.compress_options()),
        ("eval", "perplexity", file, "--data", tiny_files.text, "--seq-len", 64),
        ("eval", "kl", file, "--baseline", file, "--data", tiny_files.text, "--seq-len", 64),
        ("generate", file, "--prompt", "the"),
        ("inspect", file),
        ("verify", file),
        ("export", file, "--to", "dense", "-o", tmp_path / "dense"),
    ]
    for arguments in runs:
        result = run_qtool(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), arguments
        assert result.stdout


def test_warnings_go_to_stderr(tiny_files, tmp_path):
    options = tiny_files.compress_options("--samples", "100", "--json")
    result = run_qtool("compress", tiny_files.model("llama"), "-o", tmp_path / "out.qtm", *options)
    assert json.loads(result.stdout)["file_bytes"] > 0
    assert "more than twice" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_generate_is_a_function_of_the_seed(tiny_files):
    arguments = ("generate", tiny_files.compressed("llama"), "--prompt", "the", "--temperature", "1")
    texts = [qtool_json(*arguments, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("source", ["self", "self,TEXT"])
def test_calibration_on_what_the_model_writes(tiny_files, source, tmp_path):
    source = source.replace("TEXT", str(tiny_files.text))
    recompress(tiny_files, tmp_path / "out.qtm", "--calibration", source)
    again = recompress(tiny_files, tmp_path / "again.qtm", "--calibration", source)
    assert (tmp_path / "out.qtm").read_bytes() == again
    found = qtool_json("inspect", tmp_path / "out.qtm")
    assert found["recipe"]["calibration"]["source"] == source.replace(str(tiny_files.text), "text.txt")


# ---- the same bytes


def recompress(tiny_files, output, *options):
    result = run_qtool("compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options(*options))
    assert result.exit_code == 0, result.output
    return output.read_bytes()


def test_compressing_twice_gives_the_same_bytes(tiny_files, tmp_path):
    assert recompress(tiny_files, tmp_path / "again.qtm") == tiny_files.compressed("llama").read_bytes()


def test_another_process_and_folder_gives_the_same_bytes(tiny_files, tmp_path):
    options = tiny_files.compress_options()
    done = python("-m", "qtool.cli", "compress", tiny_files.model("llama"), *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "llama-4bit.qtm").read_bytes() == tiny_files.compressed("llama").read_bytes()


def test_another_seed_gives_another_file(tiny_files):
    with (
        QtmFile.open(tiny_files.compressed("llama")) as one,
        QtmFile.open(tiny_files.compressed("llama", "--seed", "1")) as other,
    ):
        assert one.header.provenance["calibration_sha256"] != other.header.provenance["calibration_sha256"]
        changed = {name for name in one.tensors if one.tensors[name].sha256 != other.tensors[name].sha256}
    assert changed
    assert all("proj" in name for name in changed)


def test_no_path_of_the_machine_is_in_the_file(tiny_files):
    data = tiny_files.compressed("llama").read_bytes()
    for path in (tiny_files.folder, tiny_files.folder.parent, ROOT, os.getcwd(), os.path.expanduser("~")):
        if len(str(path)) > 3:
            assert str(path).encode() not in data, path


# ---- the dry run


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ()),
        ("llama", ("--bits", "3", "--sym", "--group-size", "32")),
        ("llama", ("--embeddings", "16", "--group-size", "-1")),
        ("opt", ("--embeddings", "4")),
        ("gpt2", ()),
        ("mixtral", ("--method", "rtn")),
    ],
)
def test_dry_run_writes_nothing_and_is_right(tiny_files, family, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dry = qtool_json("compress", tiny_files.model(family), *tiny_files.compress_options(*options, "--dry-run"))
    assert os.listdir(tmp_path) == []
    found = qtool_json("inspect", tiny_files.compressed(family, *options))
    for key in ("parameters", "bits_per_weight", "quantized_share"):
        assert dry[key] == found[key]
    assert dry["file_bytes"] == pytest.approx(found["file_bytes"], rel=0.02)
    dense = [t["name"] for t in found["tensors"] if t["encoding"] == "dense"]
    assert sorted(row["name"] for row in dry["left_dense"]) == sorted(dense)
    assert dry["seconds"] > 0
    assert dry["peak_rss_bytes"] > 100_000_000


def test_dry_run_as_text(tiny_files):
    result = run_qtool("compress", tiny_files.model("llama"), *tiny_files.compress_options("--dry-run"))
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("bits per weight", "peak memory", "time", "left dense", "norm, bias or other vector"):
        assert word in result.stdout


def test_dry_run_says_what_would_stop_the_run(tiny_files, tmp_path):
    """The checks that cost nothing come with it."""
    result = run_qtool("compress", tmp_path / "nowhere", "--dry-run")
    assert result.exit_code == 1
    assert "no such file or folder" in result.stderr
