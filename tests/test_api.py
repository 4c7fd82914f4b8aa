"""The functions of `qtool`: what the command line has, by the same names, with the same defaults and results."""

import inspect
import json
import re
import shutil
from pathlib import Path

import click
import pytest
from invoke import ROOT, python, qtool_json, run_qtool

import qtool
from qtool import api
from qtool.cli import main
from qtool.errors import ConfigError

COMMANDS = {
    ("compress",): api.compress,
    ("inspect",): api.inspect,
    ("verify",): api.verify,
    ("eval", "perplexity"): api.evaluate,
    ("eval", "kl"): api.evaluate_kl,
    ("eval", "tasks"): api.evaluate_tasks,
    ("generate",): api.generate,
    ("warm",): api.warm,
    ("export",): api.export,
    ("import",): api.import_,
    ("plot",): api.plot,
}
PRINTED = {"as_json", "dry_run", "tensors"}  # what a command does with a result, or which function it calls
SPELLED = {"symmetric": "--sym", "layers": "--layer", "engine": "--for"}


def find_command(path):
    command = main
    for name in path:
        command = command.commands[name]
    return command


def leaves(command, path=()):
    if isinstance(command, click.Group):
        return [leaf for name, inner in command.commands.items() for leaf in leaves(inner, (*path, name))]
    return [path]


def test_every_command_has_its_function():
    assert sorted(leaves(main)) == sorted(COMMANDS)
    assert {function.__name__ for function in COMMANDS.values()} <= {*qtool.__all__, "_compress"}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_options_have_the_names_and_defaults_of_the_function(path):
    parameters = inspect.signature(COMMANDS[path]).parameters
    options = {option.name: option for option in find_command(path).params if option.name not in PRINTED}
    assert options.keys() == parameters.keys() - {"warn"}
    context = click.Context(find_command(path))
    for name, option in options.items():
        default = parameters[name].default
        if default is inspect.Parameter.empty:
            assert option.required, name
            continue
        assert option.type_cast_value(context, option.get_default(context)) == _as_given(option, default), name
        assert SPELLED.get(name, "--" + name.replace("_", "-")) in option.opts, name


def _as_given(option, default):
    """A default as the command line hands it on: paths as paths."""
    return Path(default) if isinstance(option.type, click.Path) and default is not None else default


def test_a_dry_run_takes_what_compress_takes():
    compress, dry_run = inspect.signature(qtool.compress), inspect.signature(qtool.dry_run)
    assert compress.parameters == dry_run.parameters
    assert qtool.compress.__doc__ and qtool.dry_run.__doc__


def test_the_package_shows_what_it_says():
    assert dir(qtool) == sorted(qtool.__all__)
    assert qtool.__all__ == sorted(qtool.__all__)
    for name in qtool.__all__:
        assert name == "__version__" or callable(getattr(qtool, name)), name
    with pytest.raises(AttributeError, match="module 'qtool' has no attribute 'nothing'"):
        qtool.nothing  # noqa: B018


def test_names_stay_functions_whatever_is_imported():
    """A module of the package would take the place of a function of its name."""
    modules = {path.stem for path in (ROOT / "qtool").glob("*")}
    assert not modules & set(qtool.__all__) - {"__init__"}


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'numpy', 'torch', 'transformers', 'datasets', 'click'}"
    code = f"import qtool, qtool.api, sys; qtool.compress, dir(qtool); print(sorted({heavy} & sys.modules.keys()))"
    assert python("-c", code).stdout == "[]\n"


def test_compress_writes_what_the_command_writes(tiny_files, output, whole):
    model, text = tiny_files.model("llama"), tiny_files.text
    options = {"calibration": str(text), "samples": 4, "seq_len": 64, "group_size": 16}
    estimate = qtool.dry_run(model, output, **options)
    assert not output.exists()
    made = qtool.compress(model, output, **options)
    assert output.read_bytes() == whole
    assert made.file == output
    assert made.file_bytes == len(whole)
    assert made.bits_per_weight == estimate.bits_per_weight == qtool.inspect(output).bits_per_weight
    printed = qtool_json("compress", model, "-o", output, *tiny_files.compress_options(), "--force")
    timed = {"seconds", "peak_rss_bytes"}
    assert {k: v for k, v in printed.items() if k not in timed} == {
        k: v for k, v in made.to_dict().items() if k not in timed
    }
    with pytest.raises(ConfigError, match="exists already"):
        qtool.compress(model, output, **options)


def test_an_option_without_sense_is_refused_as_on_the_command_line(tiny_files, output):
    with pytest.raises(ConfigError, match="bits=9: must be 2 to 8"):
        qtool.compress(tiny_files.model("llama"), output, bits=9)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bit'"):
        qtool.compress(tiny_files.model("llama"), output, bit=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda file: qtool.evaluate(file, protocol="llamacpp"), "protocol='llamacpp': must be one of gptq, llama.cpp"),
        (lambda file: qtool.export(file, "out", to="dense", dtype="f64"), "dtype='f64': must be one of float32"),
        (lambda file: qtool.export(file, "out", to="onnx"), "to='onnx': must be one of dense"),
        (lambda file: qtool.plot([file], size="foo"), "size='foo': must be one of bits"),
    ],
)
def test_what_the_command_line_has_no_words_for_is_refused_here_too(tiny_files, call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        call(tiny_files.compressed("llama"))


def test_one_pattern_is_no_list_of_letters(tiny_files):
    """And sizes and shares may be numbers."""
    options = {"calibration": str(tiny_files.text), "samples": 4, "seq_len": 64}
    one, many = (qtool.dry_run(tiny_files.model("llama"), ignore=p, **options) for p in ("q_proj", ["q_proj"]))
    assert one.left_dense == many.left_dense and one.layers
    one, other = (qtool.api._request("m", max_memory=size, outliers=s) for size, s in ((10**9, 0.01), ("1GB", "1%")))
    assert one.options == other.options and one.recipe == other.recipe


def test_warnings_are_pythons_unless_taken(tiny_files, output):
    lines = []
    qtool.api._request(tiny_files.model("llama"), output, warn=lines.append).warn("one line")
    assert lines == ["one line"]
    with pytest.warns(UserWarning, match="one line"):
        qtool.api._request(tiny_files.model("llama"), output).warn("one line")


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (("inspect",), qtool.inspect),
        (("verify",), qtool.verify),
        (("eval", "perplexity"), "evaluate"),
        (("eval", "kl"), "evaluate_kl"),
    ],
    ids=["inspect", "verify", "perplexity", "kl"],
)
def test_results_are_what_json_prints(tiny_files, command, call):
    file, text = tiny_files.compressed("llama"), str(tiny_files.text)
    if isinstance(call, str):
        model = tiny_files.model("llama")
        printed = qtool_json(*command, file, "--data", text, "--seq-len", 32, "--baseline", model)
        result = getattr(qtool, call)(file, data=text, seq_len=32, baseline=model)
    else:
        printed, result = qtool_json(*command, file), call(file)
    values = json.loads(json.dumps(result.to_dict()))
    assert values.pop("seconds", None) is None or printed.pop("seconds") >= 0
    assert values == printed


def test_generate_refuses_what_the_command_line_would(tiny_files):
    file = tiny_files.compressed("llama")
    for given, said in (({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
                        ({"temperature": -1.0}, "temperature=-1: must be 0 or more")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            qtool.generate(file, "a", **given)


def test_generate_and_export(tiny_files, tmp_path):
    file = tiny_files.compressed("llama")
    result = qtool.generate(file, "the one", max_new_tokens=4)
    assert run_qtool("generate", file, "--prompt", "the one", "--max-new-tokens", 4).stdout == f"{result.whole}\n"
    report = qtool.export(file, tmp_path / "dense", to="dense")
    assert report.files == sorted(path.name for path in (tmp_path / "dense").iterdir())
    with pytest.raises(ConfigError, match="to='zip': must be one of dense, transformers, gptq"):
        qtool.export(file, tmp_path / "zip", to="zip")


def python_example():
    section = re.search(r"^## In Python\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert section is not None
    lines = [line[4:] for line in section[1].splitlines() if line.startswith("    ") or not line]
    return "\n".join(lines)


def test_the_readmes_example_runs(tiny_files, tmp_path, monkeypatch):
    """With a tiny model in the place of the reader's, and its text."""
    shutil.copytree(tiny_files.model("llama"), tmp_path / "my-model")
    shutil.copy(tiny_files.text, tmp_path / "notes.txt")
    code = python_example()
    assert "qtool.compress(" in code and "qtool.export(" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "my-model-4bit.qtm").is_file()
    assert (tmp_path / "decoded" / "config.json").is_file()
