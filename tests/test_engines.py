"""`compress --for`: what is left open is chosen, what is given and does not go is refused, and the export is exact."""

import json
import re

import pytest
from independent_layouts import read_folder
from invoke import qtool_json, refusal, run_qtool
from tiny import make_model

from formats.reader import QtmFile
from qtool.engines import ENGINES, options_for
from qtool.errors import ConfigError

SHAPES = {"a.q_proj.weight": (576, 576), "a.down_proj.weight": (576, 1536)}
OPEN = {
    "method": "gptq",
    "symmetric": None,
    "bits": None,
    "group_size": None,
    "embeddings": None,
    "layers": (),
    "ignore": (),
}


WIDE = {f"0.{part}_proj.weight": (128, 256) for part in ("q", "k", "v", "o", "gate", "up")}


def chosen(engine, shapes=SHAPES, **given):
    return options_for(engine, {**OPEN, **given}, shapes)


def test_the_largest_group_that_divides_every_row():
    assert chosen("gptq")["group_size"] == 64  # 576 = 9 * 64
    assert chosen("gptq", {"a": (64, 4096)})["group_size"] == 128
    assert chosen("gptq", {"a": (64, 4096), "b": (64, 96)})["group_size"] == 32
    assert chosen("compressed-tensors", {"a": (64, 100)})["group_size"] == -1
    assert chosen("vllm", WIDE, group_size=32)["group_size"] == 32


def test_what_is_chosen():
    found = chosen("vllm", WIDE)
    assert (found["bits"], found["symmetric"], found["embeddings"], found["input_scales"]) == (4, True, 16, False)
    assert chosen("awq")["symmetric"] is False
    assert chosen("awq", symmetric=True)["symmetric"] is True
    assert chosen("gguf:q5_0")["bits"] == 5 and chosen("gguf:q5_0")["embeddings"] == 8
    assert chosen("gptq", bits=3)["bits"] == 3
    found = chosen("vllm", WIDE, target_bits=5.0)
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
        (
            "gguf:iq2_xs",
            {},
            "only gguf:q4_0, gguf:q5_0, gguf:q8_0, gguf:q4_1, gguf:q5_1, gguf:q2_k, gguf:q3_k, gguf:q4_k,",
        ),
        ("gguf:q4_k", {"bits": 5}, "--for gguf:q4_k: goes with --bits 4, not with --bits 5"),
        (
            "gguf:q4_k",
            {"number_format": "int"},
            "goes with --format q_k, not with --format int; leave one of the two out",
        ),
        ("gguf:q4_1", {"symmetric": True}, "has nothing like --sym; leave one of the two out"),
        ("gguf:q4_0", {"group_size": 64}, "has nothing like --group-size 64; leave one of the two out"),
        ("onnx", {}, "--for onnx: must be one of gptq, vllm, compressed-tensors, awq, gguf:q4_0"),
    ],
)
def test_what_does_not_go_is_refused_by_both_names(engine, given, said):
    with pytest.raises(ConfigError) as refused:
        chosen(engine, **given)
    assert said in str(refused.value) and str(refused.value).startswith(f"--for {engine}: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"layers": ("k_proj=8",)},
            "0.q_proj.weight, 0.k_proj.weight and 0.v_proj.weight as one matrix, of which "
            "--layer k_proj=8 takes a part; let its pattern match all of them or none",
        ),
        ({"ignore": ("up_proj",)}, "0.gate_proj.weight and 0.up_proj.weight as one matrix, of which --ignore up_proj"),
        ({"layers": ("[qk]_proj=4",), "target_bits": 5.0}, "of which --layer [qk]_proj=4 takes a part"),
    ],
)
def test_what_vllm_runs_as_one_is_not_told_apart(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen("vllm", WIDE, **given)
    assert chosen("compressed-tensors", WIDE, **given)["symmetric"]


@pytest.mark.parametrize("given", [{"layers": ("experts[.]0[.]=8",)}, {"ignore": ("experts[.]1[.].*up_proj",)}])
def test_experts_are_one_matrix_too(given):
    parts = [f"m.0.experts.{n}.{part}_proj.weight" for n in range(3) for part in ("gate", "up", "down")]
    option = "--layer experts[.]0[.]=8" if "layers" in given else "--ignore experts[.]1[.].*up_proj"
    with pytest.raises(ConfigError, match=re.escape(f"runs all experts of m.0.experts as one, of which {option} ")):
        chosen("vllm", dict.fromkeys(parts, (128, 256)), **given)
    assert chosen("vllm", dict.fromkeys(parts, (128, 256)), layers=("experts=8",))["bits"] == 4


def test_what_vllm_runs_as_one_may_be_given_together():
    assert chosen("vllm", WIDE, layers=("[qkv]_proj=8", "gate_proj=4", "o_proj=8"), ignore=("gate|up",))["bits"] == 4
    assert chosen("vllm", WIDE, layers=("k_proj=4",))["bits"] == 4
    assert chosen("vllm", WIDE, layers=("q_proj=04",), bits=4.0)["bits"] == 4  # as the command line gives it
    assert chosen("vllm", {n: s for n, s in WIDE.items() if "v_" not in n}, layers=("k_proj=8",))["bits"] == 4


@pytest.mark.parametrize(
    ("engine", "shape", "said"),
    [
        ("gptq", (80, 64), "a has 80 outputs, the engine takes multiples of 32; leave it dense by --ignore"),
        ("gptq", (64, 80), "a has 80 inputs, the engine takes multiples of 32"),
        ("vllm", (96, 128), "a has 96 outputs, the engine takes multiples of 64"),
        (
            "vllm",
            (64, 192),
            "a has 192 inputs, the engine takes multiples of 128; leave it dense by --ignore, or take ",
        ),
        ("gguf:q8_0", (7, 80), "a has 80 inputs, the engine takes multiples of 32"),
    ],
)
def test_a_shape_that_the_engine_does_not_take(engine, shape, said):
    with pytest.raises(ConfigError, match=f"--for {engine}: {said}"):
        chosen(engine, {"a": shape})


@pytest.mark.parametrize("engine", [name for name in ENGINES if not name.startswith("gguf")])
def test_the_export_is_exact(tiny_files, engine, tmp_path):
    file = tmp_path / "out.qtm"
    if engine == "vllm":  # with tiles of its kernel's size
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
        model = make_model("llama", tmp_path / "model", sizes=sizes)
    else:
        model = tiny_files.wide_model("llama")
    small = ("--samples", "4", "--seq-len", "64", "--calibration", tiny_files.text)
    qtool_json("compress", model, "-o", file, "--for", engine, *small)
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
