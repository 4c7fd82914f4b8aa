"""`export --to gptq`: what an independent reader decodes is what the file holds; what cannot be is refused."""

import json

import numpy as np
import pytest
import torch
from independent_layouts import decode_gptq, read_folder
from invoke import qtool_json, run_qtool
from tiny import make_model

from formats.embedded import model_config
from formats.export.published import published_rows
from formats.reader import QtmFile
from formats.skeleton import build_skeleton
from formats.tensors import decode_tensor

SIZES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "qwen2": {"hidden_size": 64, "intermediate_size": 96},
    "mixtral": {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 2},
    "gpt2": {"n_embd": 64},
    "phi3": {"hidden_size": 64, "intermediate_size": 96},
}
PLAIN = ("--no-input-scales", "--group-size", "32")


@pytest.fixture(scope="session")
def wide(tiny_files, tmp_path_factory):
    """family, options -> a compressed model whose shapes the engines take."""
    folder, made = tmp_path_factory.mktemp("wide"), {}

    def compress(family, *options):
        if (family, options) not in made:
            model = folder / family
            if not model.exists():
                make_model(family, model, sizes=SIZES[family])
            output = folder / f"{family}-{len(made)}.qtm"
            result = run_qtool("compress", model, "-o", output, *tiny_files.compress_options(*options))
            assert result.exit_code == 0, result.output
            made[family, options] = output
        return made[family, options]

    return compress


def expected(file):
    """Published module -> its weight [out, in] f32, and all other tensors by name."""
    with QtmFile.open(file) as opened:
        model = build_skeleton(model_config(opened))
        entries = {n: e for n, e in opened.tensors.items() if ".layers." in n or ".h." in n}
        weights = {n: opened.layer(n).dequantize() for n, e in entries.items() if e.encoding.name != "dense"}
        published = published_rows(model, {name: len(weight) for name, weight in weights.items()})
        linears = {
            name.removesuffix(".weight"): weights[part.name] if part.rows is None else weights[part.name][part.rows]
            for name, part in published.items()
        }
        others = {n: decode_tensor(opened, e) for n, e in opened.tensors.items() if n not in weights}
    return linears, others


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", ("--sym",)),
        ("llama", ("--bits", "2", "--group-size", "-1")),
        ("qwen2", ("--bits", "3", "--embeddings", "16")),
        ("mixtral", ("--bits", "8")),
        ("gpt2", ()),
        ("phi3", ("--bits", "5", "--sym")),  # in 8 bits
        ("llama", ("--layer", "down_proj=8", "--layer", "layers.1.*(q|k|v)_proj=3", "--ignore", "layers.0.*up_proj")),
    ],
)
def test_decodes_to_what_the_file_holds(wide, family, options, tmp_path):
    file = wide(family, *PLAIN, *options)
    report = qtool_json("export", file, "--to", "gptq", "-o", tmp_path / "gptq")
    assert report["losses"] == []
    assert "quantize_config.json" in report["files"]
    config, tensors = read_folder(tmp_path / "gptq")
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == config
    linears, others = expected(file)
    modules = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert modules == linears.keys()
    for module, weight in linears.items():
        assert np.array_equal(decode_gptq(config, module, tensors), weight), module
    for name, value in others.items():
        if family != "mixtral" or ".layers." not in name:  # whose router has another name on disk
            assert torch.equal(tensors[name].float(), value), name
