"""The model card of an exported folder: what it says is what the file says, and its snippet and command work."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from invoke import qtool_json, refusal

import qtool
from formats.export.card import Loading, model_card
from formats.export.command import compress_command
from formats.export.report import Loss
from formats.header import Header
from formats.reader import QtmFile
from qtool.cli_compress import compress
from qtool.options import build_recipe
from qtool.recipe import QuantSpec, Recipe, Target

DENSE = Loading(format="dense")
NOT_IN_A_RECIPE = (
    "model", "output", "dry_run", "force", "max_memory", "work_dir", "restart", "log_file", "trust_remote_code",
    "as_json", "cluster", "engine",
)  # fmt: skip


class Stranger:
    """A file of which only the header is asked for."""

    def __init__(self, header: Header) -> None:
        self.header, self.n_bytes = header, 1000


def card_of(file, *, title="out", loading=DENSE, losses=(), **members):
    """The card of a file whose header has other `members`."""
    with QtmFile.open(file) as opened:
        changed = {name: {**getattr(opened.header, name), **values} for name, values in members.items()}
        stranger = Stranger(replace(opened.header, **changed))
    return model_card(stranger, title=title, loading=loading, weights_bytes=7, losses=losses)


def recipe_of(command):
    """What a `qtool compress` command asks for."""
    words = shlex.split(command)
    assert words[:2] == ["qtool", "compress"]
    chosen = compress.make_context("compress", words[2:]).params
    chosen = {name: value for name, value in chosen.items() if name not in NOT_IN_A_RECIPE}
    return build_recipe(number_format=chosen.pop("format"), **chosen)


@pytest.mark.parametrize("to", ["dense", "transformers"])
def test_the_card_says_what_the_file_says(tiny_files, tmp_path, to):
    file = tiny_files.compressed("llama", "--bits", "3", "--outliers", "1%")
    report = qtool.export(file, tmp_path / to, to=to)
    assert "README.md" in report.files
    card, found = (tmp_path / to / "README.md").read_text(encoding="utf-8"), qtool.inspect(file)
    front = card.split("---\n")[1]
    assert front == f"library_name: transformers\npipeline_tag: text-generation\ntags:\n- qtool\n- {to}\n"
    assert f"| file that it was exported from | {found.file_bytes:,} bytes |" in card
    assert f"| bits per weight in it | {found.bits_per_weight:.3f} (linears of the blocks) |" in card
    n_bytes = (tmp_path / to / "model.safetensors").stat().st_size
    assert f"| weights of this folder | {n_bytes:,} bytes |" in card
    assert "| linears bits | 3 |" in card and "| linears outliers | 0.01 |" in card
    assert f"| mean relative error | {found.quality['mean_relative_error']:.4g} |" in card
    worst = max(found.tensors, key=lambda row: row["relative_error"] or 0)
    assert f"| largest relative error | {worst['relative_error']:.4g}, of " in card
    assert worst["name"].replace("_", "\\_") in card
    assert str(tmp_path) not in card and str(tiny_files.folder) not in card


@pytest.mark.parametrize("to", ["dense", "transformers"])
def test_its_snippet_runs(tiny_files, tmp_path, monkeypatch, capsys, to):
    qtool.export(tiny_files.compressed("llama"), tmp_path / "my-model", to=to)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "my-model" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_an_engines_card_names_what_it_needs_and_what_was_lost(tiny_files):
    loading = Loading(format="gptq", packages=("gptqmodel",), has_vllm=True)
    losses = [Loss(name="a_b", reason="outliers", error=0.01), Loss(name="c", reason="outliers", error=0.02)]
    card = card_of(tiny_files.compressed("llama"), title="my model", loading=loading, losses=losses)
    assert "    pip install torch transformers gptqmodel\n" in card
    assert "    vllm serve my?model\n" in card
    assert "**2 tensors were rounded again**" in card and "c lost most, 2%" in card
    assert "--to gptq --lossy -o FOLDER" in card
    assert "rounded again" not in card_of(tiny_files.compressed("llama"))


def test_the_base_model_is_named_where_it_is_known(tiny_files):
    file = tiny_files.compressed("llama")
    card = card_of(file, provenance={"base_model": "org/my-model"})
    assert card.startswith("---\nbase_model: org/my-model\nbase_model_relation: quantized\n")
    assert "[org/my-model](https://huggingface.co/org/my-model), compressed by qtool" in card
    assert "qtool compress org/my-model --method" in card
    for path in ("/home/me/model", "../model", "a/b/c", "org/x\ntags: y", "org/", 3, None):
        assert "base_model" not in card_of(file, provenance={"base_model": path}), path


def test_a_model_of_the_hub_is_recorded(tiny_files, output, monkeypatch):
    monkeypatch.setattr("qtool.hub.download", lambda name: tiny_files.model("llama"))
    qtool_json("compress", "org/my-model", "-o", output, *tiny_files.compress_options())
    assert qtool.inspect(output).provenance["base_model"] == "org/my-model"
    assert "base_model" not in qtool.inspect(tiny_files.compressed("llama")).provenance


def test_a_strangers_header_drives_nothing(tiny_files):
    evil = "<script>x</script> [a](http://b) `c` | d\n# e \x1b[31m"
    card = card_of(
        tiny_files.compressed("llama"), title=evil, recipe={"linears": evil, evil: 1}, quality={evil: evil}
    )  # fmt: skip
    prose = re.sub(r"```python\n.*?```", "", card, flags=re.S)
    assert "\x1b" not in card
    for raw in ("<script>", "[a](", "\n# e"):
        assert raw not in prose.replace("\\<", "").replace("\\[", ""), raw
    assert "qtool compress" not in card  # a recipe that is none has no command
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    compile(code, "README.md", "exec")


def test_what_was_imported_says_so(tiny_files):
    card = card_of(tiny_files.compressed("llama"), recipe={"imported": "gptq"})
    assert "A model, quantized elsewhere, taken over by qtool 0.1.0 and exported in the format `dense`." in card
    assert "    qtool import DIR -o model.qtm\n" in card
    card = card_of(tiny_files.compressed("llama"), recipe={"imported": "gguf"})
    assert "    qtool import FILE.gguf -o model.qtm\n" in card


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("gptq", ("--gptq-version", "1", "--dtype", "float16", "--lossy"),
         "gptq --gptq-version 1 --dtype float16 --lossy"),
        ("gptq", ("--lossy",), "gptq"),  # which lost nothing
        ("dense", ("--dtype", "bfloat16"), "dense --dtype bfloat16"),
    ],
)  # fmt: skip
def test_the_export_is_given_with_its_options(tiny_files, to, options, said, tmp_path):
    qtool_json("export", tiny_files.wide("llama"), "--to", to, "-o", tmp_path / "out", *options)
    assert f"    qtool export model.qtm --to {said} -o FOLDER\n" in (tmp_path / "out/README.md").read_text()


def test_a_recipe_of_another_make_has_a_card(tiny_files):
    for recipe in ({}, {"linears": None}, {"linears": {"method": 3}}, {"target": [1]}):
        assert "## Recipe" in card_of(tiny_files.compressed("llama"), recipe=recipe)


def test_an_embedded_file_of_its_name_is_refused(tiny_files, tmp_path, monkeypatch):
    file = tiny_files.compressed("llama")
    monkeypatch.setattr("formats.export.folder.CARD", "tokenizer.json")
    expected = f"{file}: file 'tokenizer.json': has the name of what is exported"
    assert refusal("export", file, "--to", "dense", "-o", tmp_path / "out") == expected
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_card_is_replaced(tiny_files, tmp_path):
    for _ in range(2):
        qtool_json("export", tiny_files.compressed("llama"), "--to", "dense", "-o", tmp_path / "out", "--force")


@pytest.mark.parametrize("options", [(), ("--bits", "3", "--outliers", "1%")], ids=" ".join)
def test_the_command_gives_the_recipe_of_a_file(tiny_files, options):
    recipe = qtool.inspect(tiny_files.compressed("llama", *options)).recipe
    command = compress_command(recipe, "MODEL")
    assert json.loads(json.dumps(recipe_of(command).to_dict())) == recipe


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--bits 3 --sym --no-act-order --percdamp 0.05 --seed 3 --min-expert-tokens 9",
        "--method spqr --bits 3",
        "--method spqr --outliers 0.5%",
        "--method rtn --format nf4 --double-quant",
        "--method rtn --format trellis --bits 3",
        "--method int8 --activation-threshold 5",
        "--method int8",
        "--method ternary",
        "--format ternary --ternary-grid mse --percdamp 0.2",
        "--bits 0.8",
        "--method rtn --format ternary",
        "--effort best --bits 2",
        "--effort fast",
        "--format q_k --bits 5 --no-act-order",
        "--method rtn --format q_1",
        "--effort fast --format trellis --outlier-threshold 0.4",
        "--format trellis --outlier-threshold 0",
        "--target-size 90MB",
        "--target-size 90MB --embeddings 4 --fused",
        "--target-bits 3.5 --format int",
        "--target-bits 3.1234567",
        "--outliers 1% --outlier-threshold 0.3",
        "--format trellis --outliers 1% --outlier-threshold 0.3",
        "--format trellis --outliers 1%",
        "--format ternary --act-order --input-scales",
        "--layer down_proj=8 --layer 'a=b c=2' --ignore 'layers[.]0[.]' --independent",
        "--calibration 'my notes.txt' --text-field body --samples 8",
    ],
)
def test_the_command_gives_the_recipe_of_any_options(options):
    recipe = recipe_of(f"qtool compress MODEL {options}")
    again = recipe_of(compress_command(json.loads(json.dumps(recipe.to_dict())), "MODEL"))
    if not recipe.n_windows:  # what is not calibrated records no text
        recipe = replace(recipe, calibration=again.calibration)
    assert again == recipe


def test_widths_of_an_engine_have_no_command():
    recipe = Recipe(target=Target(bits=4), widths=(4, 8)).to_dict()
    assert compress_command(recipe, "MODEL") is None
    assert compress_command(recipe | {"widths": ()}, "MODEL") is not None


def test_every_choice_of_a_recipe_is_in_the_command():
    """A member that is added to a recipe has to be thought of here."""
    source = (Path(__file__).parents[1] / "formats/export/command.py").read_text()
    named = set(re.findall(r'"(\w+)"', source))
    assert {*Recipe.__dataclass_fields__, *QuantSpec.__dataclass_fields__} <= named
