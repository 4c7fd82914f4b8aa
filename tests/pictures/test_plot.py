"""`qtool plot`: files and results of evaluations become points; what cannot be compared is refused or said."""

import json
import os
import shutil

import pytest
from invoke import python, qtool_json, refusal, run_qtool
from page_tools import cells, check_policy, of_class, parse, svgs, tables, words

from qtool.pictures.results import MAX_RESULT_BYTES

METHODS = {"a": (), "b": ("--bits", "3"), "c": ("--method", "rtn")}


@pytest.fixture
def folder(tiny_files, tmp_path, monkeypatch):
    """Three files of one model, a.qtm to c.qtm, in the working directory."""
    for name, options in METHODS.items():
        shutil.copy(tiny_files.compressed("llama", *options), tmp_path / f"{name}.qtm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def result(folder, name, perplexity=None, model=None, **values):
    """The path of a result as qtool eval prints it."""
    values = {"model": model or f"{name}.qtm", "data_sha256": "0", "seq_len": 64, **values}
    if perplexity is not None:
        values["perplexity"] = perplexity
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path.name


def page(path="plot.html"):
    with open(path, encoding="utf-8") as file:
        tree = parse(file.read())
    check_policy(tree)
    return tree


def test_recorded_errors_are_drawn_and_labelled_so(folder):
    drawn = qtool_json("plot", "a.qtm", "b.qtm")
    found = {name: qtool_json("inspect", f"{name}.qtm") for name in "ab"}
    assert drawn["quality"] == "error"
    assert drawn["points"] == [
        {
            "label": name,
            "series": "gptq",
            "size": found[name]["bits_per_weight"],
            "quality": found[name]["quality"]["mean_relative_error"],
        }
        for name in "ab"
    ]
    assert drawn["frontier"] == ["b", "a"]
    assert drawn["notes"] == [
        "a recorded error is no perplexity: qtool eval perplexity FILE --json > R.json, then plot R.json"
    ]
    tree = page()
    title = "Recorded mean relative error against size"
    assert words(next(tree.iter("h1"))) == title
    assert len(of_class(svgs(tree)[title], "series")) == 2
    rows = cells(tables(tree)["file"])
    assert [(row[0], row[5]) for row in rows] == [("b", "yes"), ("a", "yes")]
    assert rows[1][2] == f"{found['a']['bits_per_weight']:.3f}"


def test_errors_of_other_texts_are_not_called_comparable(folder):
    notes = qtool_json("plot", "a.qtm", "c.qtm")["notes"]
    assert notes[0].startswith("the errors were not all measured on the same calibration text")
    assert "The errors were not all measured on the same calibration text" in words(page())


def test_files_of_other_models_are_told(folder, tiny_files):
    notes = qtool_json("plot", "a.qtm", tiny_files.compressed("qwen2"))["notes"]
    assert notes[0] == "the files were not all made from the same model"


def test_what_eval_prints_can_be_plotted(folder, tiny_files):
    """As the help says it: the result names its file, so that the result alone is enough."""
    options = ("--data", tiny_files.text, "--seq-len", 64, "--baseline", tiny_files.model("llama"))
    measured = {}
    for name in "ab":
        measured[name] = qtool_json("eval", "perplexity", f"{name}.qtm", *options)
        (folder / f"{name}.json").write_text(json.dumps(measured[name]))
    drawn = qtool_json("plot", "a.json", "b.json", "-o", "chart.svg")
    assert drawn["quality"] == "perplexity"
    assert [p["quality"] for p in drawn["points"]] == [measured[name]["perplexity"] for name in "ab"]
    assert [p["label"] for p in drawn["points"]] == ["a", "b"]
    assert drawn["references"] == {"uncompressed": measured["a"]["baseline_perplexity"]}
    (svg,) = svgs(parse((folder / "chart.svg").read_text())).values()
    assert len(of_class(svg, "reference")) == 1
    drawn = qtool_json("plot", "a.json", "b.json", "--quality", "kl")
    assert [p["quality"] for p in drawn["points"]] == [measured[name]["kl_mean"] for name in "ab"]
    assert drawn["references"] == {}


def test_results_are_put_to_the_files_that_they_name(folder):
    results = [result(folder, "r1", 30, "b.qtm"), result(folder, "r2", 20, "elsewhere/a.qtm")]
    drawn = qtool_json("plot", "a.qtm", *results, "b.qtm")
    assert {p["label"]: p["quality"] for p in drawn["points"]} == {"a": 20, "b": 30}
    (folder / "sub").mkdir()
    beside = [f"sub/{result(folder / 'sub', 'r3', 40, '/nowhere/c.qtm')}"]
    shutil.copy("c.qtm", "sub/c.qtm")
    assert qtool_json("plot", *beside, "--force")["points"][0]["quality"] == 40


def test_two_results_of_one_file_are_one_point(folder):
    kl = result(folder, "kl", None, "a.qtm", kl_mean=0.5)
    drawn = qtool_json("plot", "a.qtm", result(folder, "a", 30), kl, os.path.abspath("a.qtm"))
    assert [(p["label"], p["quality"]) for p in drawn["points"]] == [("a", 30)]
    assert qtool_json("plot", kl, "--force")["quality"] == "kl"


def test_the_uncompressed_model_is_a_line(folder):
    results = [result(folder, "base", 20, "./my-model"), result(folder, "a", 25, baseline_perplexity=20.0)]
    assert qtool_json("plot", *results)["references"] == {"my-model": 20}


def test_files_called_the_same_are_told_apart(folder):
    (folder / "new").mkdir()
    shutil.copy("b.qtm", "new/a.qtm")
    drawn = qtool_json("plot", "a.qtm", "new/a.qtm")
    assert [p["label"] for p in drawn["points"]] == ["a", "new/a"]
    message = refusal("plot", "a.qtm", "new/a.qtm", result(folder, "r", 30, "/nowhere/a.qtm"), "--force")
    assert message == "r.json: measured /nowhere/a.qtm; a.qtm and new/a.qtm are both called so; give it by its path"


def test_against_bytes(folder):
    drawn = qtool_json("plot", "a.qtm", "b.qtm", "--size", "bytes")
    assert [p["size"] for p in drawn["points"]] == [os.path.getsize(f"{name}.qtm") / 1e6 for name in "ab"]
    assert "size of the file, MB" in words(page())


def test_as_text(folder):
    done = run_qtool("plot", "a.qtm", "b.qtm")
    first, note = done.stdout.splitlines()
    assert first == "plot.html: 2 files, recorded mean relative error; on the frontier: b, a"
    assert note.startswith("note: a recorded error is no perplexity")


def test_names_cannot_become_markup(folder):
    name = "<script>alert(1)<&quot;'"
    shutil.copy("a.qtm", f"{name}.qtm")
    qtool_json("plot", f"{name}.qtm", result(folder, "r", 30, f"{name}.qtm"), result(folder, "base", 20, "<b>\x1b"))
    assert cells(tables(page())["file"])[0][0] == name
    assert qtool_json("plot", f"{name}.qtm", "-o", "x.svg")["points"][0]["label"] == name
    parse((folder / "x.svg").read_text())


# ---- refusals


def test_a_file_without_a_figure_says_what_to_run(folder):
    measured = result(folder, "a", 30)
    assert refusal("plot", measured, "b.qtm") == (
        "b.qtm: no perplexity among what was given; run qtool eval perplexity b.qtm --json > b.json "
        "and give the result too"
    )
    assert refusal("plot", measured, "--quality", "kl") == (
        "a.qtm: no kl among what was given; run qtool eval perplexity a.qtm --baseline MODEL --json > a.json "
        "and give the result too"
    )
    assert qtool_json("plot", measured, "b.qtm", "--quality", "error")["quality"] == "error"


def test_a_file_that_records_nothing(folder, tmp_path):
    from formats.writer import Writer

    with Writer(tmp_path / "bare.qtm") as writer:
        writer.finish(model={}, recipe={}, provenance={}, quality={"mean_relative_error": 1.0})
    with Writer(tmp_path / "none.qtm") as writer:
        writer.finish(model={}, recipe={"linears": 3}, provenance={"source_files": 3}, quality={})
    assert qtool_json("plot", "bare.qtm")["points"][0]["series"] == "unknown method"
    assert refusal("plot", "none.qtm", "--force") == (
        "none.qtm: records no relative error; measure it: qtool eval perplexity none.qtm --json > none.json"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_sha256": "1"}, 'measured with data_sha256 "1", a.json with "0"'),
        ({"seq_len": 128}, "measured with seq_len 128, a.json with 64"),
        ({"protocol": "llama.cpp"}, 'measured with protocol "llama.cpp", a.json with null'),
    ],
)
def test_results_on_other_conditions_are_refused(folder, changes, said):
    message = refusal("plot", result(folder, "a", 30), result(folder, "b", 40, **changes))
    assert message == f"b.json: {said}: not comparable; measure both alike"
    assert not (folder / "plot.html").exists()


def test_results_against_other_baselines_are_refused(folder):
    results = [result(folder, "a", 30, baseline_perplexity=20), result(folder, "b", 40, baseline_perplexity=21)]
    assert refusal("plot", *results) == (
        "b.json: its baseline has perplexity 21, that of a.json 20: not comparable; measure both against one baseline"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "r.json: not JSON (Expecting"),
        ("\udcff", "r.json: not JSON ("),
        ("[" * 100_000, "r.json: not JSON (maximum recursion depth exceeded"),
        ("[1]", "r.json: no result of qtool eval ... --json: it names no model"),
        ('{"perplexity": 3}', "r.json: no result of qtool eval ... --json: it names no model"),
        ('{"model": 3, "perplexity": 3}', "r.json: no result of qtool eval ... --json: it names no model"),
        ('{"model": "a.qtm"}', "r.json: holds neither a perplexity nor a KL divergence; measure with qtool eval"),
        ('{"model": "a.qtm", "perplexity": NaN}', "r.json: holds neither a perplexity nor a KL divergence"),
        ('{"model": "a.qtm", "perplexity": true}', "r.json: holds neither a perplexity nor a KL divergence"),
        ('{"model": "a.qtm", "perplexity": -1}', "r.json: holds neither a perplexity nor a KL divergence"),
        ('{"model": "a.qtm", "perplexity": 1' + "0" * 400 + "}", "r.json: holds neither a perplexity nor a KL"),
        ('{"model": "gone.qtm", "perplexity": 3}', "r.json: measured gone.qtm, which is not there; give that file too"),
        ('{"model": "folder", "perplexity": 3}', "no .qtm file is among what was given; give one, or its result"),
        (" " * (MAX_RESULT_BYTES + 1), "r.json: more than 1,048,576 bytes: no result of qtool eval ... --json"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(folder, text, said):
    (folder / "r.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refusal("plot", "r.json").startswith(said)


def test_a_result_that_is_no_json_says_how_one_is_made(folder):
    (folder / "r.json").write_text("")
    assert refusal("plot", "r.json") == (
        "r.json: not JSON (Expecting value: line 1 column 1 (char 0)); write it with qtool eval ... --json > r.json"
    )


def test_what_is_no_file_is_refused(folder):
    (folder / "x.qtm").write_text("no such thing, but long enough to have a preamble of sixty-four bytes")
    assert refusal("plot", "x.qtm").endswith("not a .qtm file (SPEC 2.2)")
    assert refusal("plot", "gone.qtm") == "gone.qtm: No such file or directory"
    assert refusal("plot", "gone.json") == "gone.json: No such file or directory"


def test_where_the_output_may_not_go(folder):
    assert refusal("plot", "a.qtm", "-o", "a.png") == "--output a.png: the name must end in .html or .svg"
    assert refusal("plot", "a.qtm", "-o", "no/a.svg") == "no/a.svg: its folder does not exist; make it first"
    run_qtool("plot", "a.qtm")
    assert refusal("plot", "a.qtm") == "plot.html: exists already; give another --output or --force"
    assert run_qtool("plot", "a.qtm", "--force").exit_code == 0


def test_plot_imports_no_slow_library(folder):
    code = "import sys; from qtool.cli import main; main(['plot', 'a.qtm'], standalone_mode=False);"
    report = "print(sorted({'numpy', 'torch', 'transformers'} & sys.modules.keys()))"
    assert python("-c", code + report, cwd=folder).stdout.splitlines()[-1] == "[]"
