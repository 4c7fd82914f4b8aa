"""`compress --for`: what is left open is chosen, what is given and does not go is refused, and the export is exact."""

import json

import pytest
from independent_layouts import read_folder
from invoke import qtool_json, refusal, run_qtool

from formats.reader import QtmFile
from qtool.engines import ENGINES, options_for
from qtool.errors import ConfigError

SHAPES = {"a.q_proj.weight": (576, 576), "a.down_proj.weight": (576, 1536)}
OPEN = {"method": "gptq", "symmetric": None, "bits": None, "group_size": None, "embeddings": None, "layers": ()}


def chosen(engine, shapes=SHAPES, **given):
    return options_for(engine, {**OPEN, **given}, shapes)


def test_the_largest_group_that_divides_every_row():
    assert chosen("gptq")["group_size"] == 64  # 576 = 9 * 64
    assert chosen("gptq", {"a": (64, 4096)})["group_size"] == 128
    assert chosen("gptq", {"a": (64, 4096), "b": (64, 96)})["group_size"] == 32
    assert chosen("compressed-tensors", {"a": (64, 100)})["group_size"] == -1
    assert chosen("gguf:q4_0")["group_size"] == 32
    assert chosen("vllm", group_size=32)["group_size"] == 32


def test_what_is_chosen():
    found = chosen("vllm")
    assert (found["bits"], found["symmetric"], found["embeddings"], found["input_scales"]) == (4, True, 16, False)
    assert chosen("awq")["symmetric"] is False
    assert chosen("awq", symmetric=True)["symmetric"] is True
    assert chosen("gguf:q5_0")["bits"] == 5 and chosen("gguf:q5_0")["embeddings"] == 8
    assert chosen("gptq", bits=3)["bits"] == 3
    found = chosen("vllm", target_bits=5.0)
    assert (found["bits"], found["fused"], found["widths"]) == (None, True, (4, 8))
    assert "input_scales" not in chosen("gptq", method="rtn")  # which has none


@pytest.mark.parametrize(
    ("engine", "given", "said"),
    [
        ("gptq", {"symmetric": False}, "--for gptq: goes with --sym, not with --asym; leave one of the two out"),
        ("gptq", {"bits": 5}, "--for gptq: goes with --bits 4, --bits 2, --bits 3 or --bits 8, not with --bits 5"),
        ("vllm", {"bits": 3}, "--for vllm: goes with --bits 4 or --bits 8, not with --bits 3"),
        ("gptq", {"input_scales": True}, "goes with --no-input-scales, not with --input-scales"),
        ("gptq", {"outliers": "1%"}, "has nothing like --outliers 1%; leave one of the two out"),
        ("awq", {"stat_bits": 3}, "goes with --stat-bits 0, not with --stat-bits 3"),
        ("gptq", {"number_format": "nf4"}, "goes with --format int, not with --format nf4"),
        ("gptq", {"method": "spqr"}, "goes with --method gptq or --method rtn, not with --method spqr"),
        ("gptq", {"embeddings": 8}, "goes with --embeddings 16, not with --embeddings 8"),
        ("gptq", {"group_size": 48}, "the engine has groups of 128, 64, 32 or -1, not of --group-size 48"),
        ("gptq", {"group_size": 128}, "a.q_proj.weight has 576 inputs, which groups of 128 do not divide"),
        ("gptq", {"layers": ("down_proj=5",)}, "bits must be 4, 2, 3 or 8, --layer down_proj=5 is something else"),
        ("awq", {"target_bits": 4.5}, "has one width, --target-bits 4.5 mixes them"),
        ("gguf:q4_k", {}, "only gguf:q4_0, gguf:q4_1, gguf:q5_0, gguf:q5_1, gguf:q8_0 can be exact; export --lossy"),
        ("onnx", {}, "--for onnx: must be one of gptq, vllm, compressed-tensors, awq, gguf:q4_0"),
    ],
)
def test_what_does_not_go_is_refused_by_both_names(engine, given, said):
    with pytest.raises(ConfigError) as refused:
        chosen(engine, **given)
    assert said in str(refused.value) and str(refused.value).startswith(f"--for {engine}: ")


@pytest.mark.parametrize(
    ("engine", "shape", "said"),
    [
        ("gptq", (80, 64), "a has 80 outputs, the engine takes multiples of 32; leave it dense by --ignore"),
        ("gptq", (64, 80), "a has 80 inputs, the engine takes multiples of 32"),
        ("vllm", (96, 64), "a has 96 outputs, the engine takes multiples of 64"),
        ("gguf:q8_0", (7, 80), "a has 80 inputs, the engine takes multiples of 32"),
    ],
)
def test_a_shape_that_the_engine_does_not_take(engine, shape, said):
    with pytest.raises(ConfigError, match=f"--for {engine}: {said}"):
        chosen(engine, {"a": shape})


@pytest.mark.parametrize("engine", [name for name in ENGINES if not name.startswith("gguf")])
def test_the_export_is_exact(tiny_files, engine, tmp_path):
    model, file = tiny_files.wide_model("llama"), tmp_path / "out.qtm"
    ignore = ("--ignore", "k_proj|v_proj|gate|up") if engine == "vllm" else ()
    small = ("--samples", "4", "--seq-len", "64", "--calibration", tiny_files.text)
    qtool_json("compress", model, "-o", file, "--for", engine, *small, *ignore)
    with QtmFile.open(file) as opened:
        assert opened.header.recipe["embeddings"] == 16
    to = "gptq" if engine == "vllm" else engine
    assert qtool_json("export", file, "--to", to, "-o", tmp_path / to)["losses"] == []


def test_an_engine_under_a_target(tiny_files, tmp_path):
    """Widths that the engine has, and one for what reads one input."""
    file, small = tmp_path / "out.qtm", ("--samples", "4", "--seq-len", "64", "--calibration", tiny_files.text)
    model = tiny_files.wide_model("llama")
    qtool_json("compress", model, "-o", file, "--for", "gptq", "--target-bits", "4", *small)
    assert qtool_json("export", file, "--to", "gptq", "-o", tmp_path / "gptq")["losses"] == []
    config, _ = read_folder(tmp_path / "gptq")
    with QtmFile.open(file) as opened:
        bits = {name: entry.encoding.bits for name, entry in opened.tensors.items() if name.endswith("proj.weight")}
    assert set(bits.values()) <= {2, 3, 4, 8}
    for index in range(3):
        block = f"model.layers.{index}"
        assert len({bits[f"{block}.self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
        assert bits[f"{block}.mlp.gate_proj.weight"] == bits[f"{block}.mlp.up_proj.weight"]
    assert json.dumps(config["dynamic"]) if len(set(bits.values())) > 1 else "dynamic" not in config


def test_on_the_command_line(tiny_files, tmp_path):
    message = refusal("compress", tiny_files.model("llama"), "-o", tmp_path / "out.qtm", "--for", "gptq")
    assert message.startswith("--for gptq: model.layers.0.self_attn.k_proj.weight has 16 outputs")
    message = refusal(
        "compress", tiny_files.wide_model("llama"), "-o", tmp_path / "out.qtm", "--for", "awq", "--bits", "3"
    )
    assert message == "--for awq: goes with --bits 4, not with --bits 3; leave one of the two out"
    assert "--for" in run_qtool("compress", "--help").stdout
    assert not (tmp_path / "out.qtm").exists()
