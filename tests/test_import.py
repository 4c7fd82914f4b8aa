"""`qtool import`: what engines hold comes back as it was; what cannot be told or held is refused or named."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from independent_layouts import decode_gptq, read_folder
from invoke import qtool_json, refusal, run_qtool
from safetensors.torch import load_file, save_file

from formats.export import folder as export_folder
from formats.layer import QuantizedLinear
from formats.reader import QtmFile
from formats.tensors import decode_tensor

MIXED = ("--layer", "down_proj=8", "--layer", "layers.1.*(q|k|v)_proj=3", "--ignore", "layers.0.*up_proj")


def export(file, to, folder, *options):
    qtool_json("export", file, "--to", to, "-o", folder, *options)
    return folder


def import_(folder, output, *options):
    return qtool_json("import", folder, "-o", output, *options)


def edit_config(folder, edit):
    """Change `quantization_config` in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def zeros_of(layer):
    return np.full(layer.groups, 1 << (layer.bits - 1), np.uint8) if layer.zeros is None else layer.zeros


def assert_same(one, other):
    """Codes, scales and zeros, and all else by value."""
    with QtmFile.open(one) as first, QtmFile.open(other) as second:
        assert first.tensors.keys() == second.tensors.keys()
        for name, entry in first.tensors.items():
            if ".layers." in name or ".h." in name:
                assert entry.encoding.name == second.tensors[name].encoding.name, name
                assert entry.transposed == second.tensors[name].transposed
            if second.tensors[name].encoding.name == "dense":
                values = first.dense(name) if entry.encoding.name == "dense" else first.layer(name).dequantize()
                assert np.array_equal(values, second.dense(name)), name
                continue
            a, b = first.layer(name), second.layer(name)
            assert isinstance(a, QuantizedLinear) and (a.bits, a.group_size) == (b.bits, b.group_size), name
            assert np.array_equal(a.codes, b.codes), name
            assert np.array_equal(a.scales.view(np.uint16), b.scales.view(np.uint16)), name
            assert np.array_equal(zeros_of(a), zeros_of(b)), name


@pytest.mark.parametrize(
    ("to", "family", "options"),
    [
        ("gptq", "llama", ("--sym",)),
        ("gptq", "llama", ("--bits", "2", "--group-size", "-1")),
        ("gptq", "qwen2", ("--bits", "3", "--embeddings", "16")),
        ("gptq", "mixtral", ("--bits", "8")),
        ("gptq", "gpt2", ()),
        ("gptq", "llama", MIXED),
        ("compressed-tensors", "llama", ("--sym", "--bits", "5", *MIXED)),
        ("compressed-tensors", "mixtral", ("--sym", "--bits", "8", "--embeddings", "16")),
        ("awq", "llama", ()),
        ("awq", "mixtral", ()),
    ],
)
def test_import_of_an_export_has_the_same_numbers(tiny_files, to, family, options, tmp_path):
    file = tiny_files.wide(family, *options)
    result = import_(export(file, to, tmp_path / "out"), tmp_path / "back.qtm")
    assert result["decoded"] == {}
    assert_same(file, tmp_path / "back.qtm")
    assert run_qtool("verify", tmp_path / "back.qtm").exit_code == 0
    assert f"taken over as it was ({to})" in run_qtool("inspect", tmp_path / "back.qtm").stdout


def test_version_1_of_our_own_comes_back_too(tiny_files, tmp_path):
    """Its zeros are stored less one, and the file says who wrote it."""
    file = tiny_files.wide("llama", "--bits", "8")
    with QtmFile.open(file) as opened:
        layers = [opened.layer(name) for name, entry in opened.tensors.items() if "proj" in name]
    assert all(layer.zeros.min() > 0 for layer in layers)
    import_(export(file, "gptq", tmp_path / "out", "--gptq-version", "1"), tmp_path / "back.qtm")
    assert_same(file, tmp_path / "back.qtm")


def test_shards(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setattr(export_folder, "MAX_SHARD_BYTES", 60_000)
    file = tiny_files.wide("llama", "--sym")
    folder = export(file, "gptq", tmp_path / "out")
    assert (folder / "model.safetensors.index.json").exists()
    import_(folder, tmp_path / "back.qtm")
    assert_same(file, tmp_path / "back.qtm")


def test_the_same_folder_gives_the_same_bytes(tiny_files, tmp_path):
    folder = export(tiny_files.wide("llama", "--sym"), "gptq", tmp_path / "out")
    import_(folder, tmp_path / "a.qtm")
    import_(folder, tmp_path / "b.qtm")
    assert (tmp_path / "a.qtm").read_bytes() == (tmp_path / "b.qtm").read_bytes()


@pytest.fixture
def gptq(tiny_files, tmp_path):
    """A folder of version 2 with zeros, to be changed."""
    return export(tiny_files.wide("llama"), "gptq", tmp_path / "gptq")


Q_PROJ = "model.layers.0.self_attn.q_proj"


def up_proj_as_q_proj(tensors):
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return {f"{Q_PROJ}.{part}": tensors[f"model.layers.0.mlp.up_proj.{part}"].clone() for part in parts}


def test_scales_that_fp16_does_not_hold_are_left_dense_and_named(gptq, tmp_path):
    def widen(tensors):
        tensors[f"{Q_PROJ}.scales"] = tensors[f"{Q_PROJ}.scales"].float() * 1.0001

    edit_tensors(gptq, widen)
    result = import_(gptq, tmp_path / "back.qtm")
    assert result["decoded"] == {f"{Q_PROJ}.weight": "scales beyond fp16; stored as float32"}
    config, tensors = read_folder(gptq)
    with QtmFile.open(tmp_path / "back.qtm") as opened:
        assert np.array_equal(opened.dense(f"{Q_PROJ}.weight"), decode_gptq(config, Q_PROJ, tensors))
    lines = run_qtool("import", gptq, "-o", tmp_path / "again.qtm").stdout
    assert f"{Q_PROJ}.weight: scales beyond fp16; stored as float32" in lines


def test_scales_in_bf16_that_fp16_holds_are_taken(gptq, tmp_path):
    def as_bf16(tensors):
        scales = tensors[f"{Q_PROJ}.scales"]
        tensors[f"{Q_PROJ}.scales"] = torch.full_like(scales, 0.0625).bfloat16()

    edit_tensors(gptq, as_bf16)
    assert import_(gptq, tmp_path / "back.qtm")["decoded"] == {}
    with QtmFile.open(tmp_path / "back.qtm") as opened:
        assert (opened.layer(f"{Q_PROJ}.weight").scales == np.float16(0.0625)).all()


def test_a_zero_of_2_to_the_bits_is_left_dense(gptq, tmp_path):
    """Version 1 has one where all bits are set; readers take it so, and no code of ours can."""

    def wrap(tensors):
        tensors[f"{Q_PROJ}.qzeros"].fill_(-1)

    edit_tensors(gptq, wrap)
    edit_config(gptq, lambda config: config.update(checkpoint_format="gptq"))
    assert import_(gptq, tmp_path / "back.qtm")["decoded"][f"{Q_PROJ}.weight"] == "a zero of 16; stored as float32"
    config, tensors = read_folder(gptq)
    with QtmFile.open(tmp_path / "back.qtm") as opened:
        assert np.array_equal(opened.dense(f"{Q_PROJ}.weight"), decode_gptq(config, Q_PROJ, tensors))


def test_version_1_with_zeros_of_doubtful_origin(gptq, tmp_path):
    def of(*names):
        return lambda config: config.update(checkpoint_format="gptq", meta={"quantizer": [*names]})

    for names in ((), ("auto_gptq:0.7",), ("gptqmodel:0.8.9",)):
        edit_config(gptq, of(*names))
        message = refusal("import", gptq, "-o", tmp_path / "back.qtm")
        assert "version 1 of gptq with zeros" in message and "--assume-v1-zeros" in message
        assert not (tmp_path / "back.qtm").exists()
    import_(gptq, tmp_path / "back.qtm", "--assume-v1-zeros")
    edit_config(gptq, of("gptqmodel:5.2.0"))
    import_(gptq, tmp_path / "other.qtm")
    assert_same(tmp_path / "back.qtm", tmp_path / "other.qtm")


def test_version_1_that_is_called_symmetric_is_taken_at_its_numbers(gptq, tmp_path):
    """Whatever the config says, or leaves out: with zeros that are not in the middle it is doubtful."""
    edit_config(gptq, lambda config: [config.pop("sym"), config.update(checkpoint_format="gptq", meta={})])
    assert "version 1 of gptq with zeros" in refusal("import", gptq, "-o", tmp_path / "back.qtm")
    edit_tensors(gptq, lambda t: [t[key].fill_(0x77777777) for key in t if key.endswith("qzeros")])
    import_(gptq, tmp_path / "back.qtm")
    with QtmFile.open(tmp_path / "back.qtm") as opened:
        assert (zeros_of(opened.layer(f"{Q_PROJ}.weight")) == 8).all()


def test_biases_of_zeros_are_none(gptq, tmp_path):
    """As AutoGPTQ stored them for every linear; any other is refused."""
    import_(gptq, tmp_path / "plain.qtm")
    edit_tensors(gptq, lambda t: t.update({f"{Q_PROJ}.bias": torch.zeros(64, dtype=torch.float16)}))
    import_(gptq, tmp_path / "back.qtm")
    assert_same(tmp_path / "plain.qtm", tmp_path / "back.qtm")
    edit_tensors(gptq, lambda t: t[f"{Q_PROJ}.bias"].fill_(1))
    message = refusal("import", gptq, "-o", tmp_path / "again.qtm")
    assert f"tensor {Q_PROJ}.bias: import does not know what it does" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transform_config": {"config_groups": {"v": {"type": "hadamard"}}}}, "transform_config "),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config "),
    ],
)
def test_what_a_folder_does_besides_is_not_left_out(tiny_files, change, said, tmp_path):
    folder = export(tiny_files.wide("llama", "--sym"), "compressed-tensors", tmp_path / "out")
    edit_config(folder, lambda config: config.update(change))
    message = refusal("import", folder, "-o", tmp_path / "back.qtm")
    assert said in message and message.endswith("import knows none")


@pytest.mark.parametrize("pattern", ["([a-z0-9_.]+)+!", "(a*)*b", "((a+))+", "(ab*){9}", "x" * 70_000])
def test_patterns_that_could_take_forever(gptq, pattern, tmp_path):
    edit_config(gptq, lambda config: config.update(dynamic={f"-:{pattern}": {}}))
    message = refusal("import", gptq, "-o", tmp_path / "back.qtm")
    assert message.endswith("could take forever to match; name the modules")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes': import knows gptq, awq, compressed-tensors"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin': import knows 'gptq' or 'gptq_v2'"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16': import knows 'int32'"),
        ({"bits": 5}, "bits 5: must be 2, 3, 4 or 8"),
        ({"bits": True}, "bits True: must be"),
        ({"group_size": 0}, "group_size 0: must be -1 or above 0"),
        ({"group_size": 10**30}, "must be -1 or above 0"),
        ({"sym": "yes"}, "sym 'yes': must be True or False"),
        ({"dynamic": {"+:(": {}}}, "is no regular expression"),
        ({"dynamic": [1]}, "dynamic [1]: must be an object"),
        ({"group_size": 16}, "qzeros is int32[2, 8]: must be i4[4, 8]"),
        ({"bits": 8}, "qzeros is int32"),
    ],
)
def test_a_config_that_is_not_known(gptq, change, said, tmp_path):
    edit_config(gptq, lambda config: config.update(change))
    message = refusal("import", gptq, "-o", tmp_path / "back.qtm")
    assert said in message and str(gptq) in message
    assert sorted(os.listdir(tmp_path)) == ["gptq"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.scales"), "scales is missing"),
        (lambda t: t.update({f"{Q_PROJ}.perm": torch.zeros(64)}), f"tensor {Q_PROJ}.perm: import does not know"),
        (lambda t: t.update({"model.layers.0.k_scale": torch.zeros(1)}), "tensor model.layers.0.k_scale: import"),
        (lambda t: t[f"{Q_PROJ}.g_idx"].fill_(2), "g_idx goes from 2 to 2: must be within the 2 groups"),
        (lambda t: t[f"{Q_PROJ}.g_idx"].fill_(-1), "g_idx goes from -1 to -1"),
        (lambda t: t[f"{Q_PROJ}.scales"].fill_(float("nan")), "a scale is NaN, infinite or beyond"),
        (lambda t: t.update({f"{Q_PROJ}.g_idx": torch.zeros(63, dtype=torch.int32)}), "g_idx is int32[63]"),
        (lambda t: t.update({f"{Q_PROJ}.qweight": torch.zeros(4, dtype=torch.int32)}), "must be a matrix"),
        (lambda t: t.update({f"{Q_PROJ}.qweight": torch.zeros(7, 64, dtype=torch.int32)}), "56 inputs"),
        (lambda t: t.update({f"{Q_PROJ}.qweight": t[f"{Q_PROJ}.qweight"].float()}), "qweight is float32[8, 64]"),
        (lambda t: t.update(up_proj_as_q_proj(t)), "q_proj.weight is [96, 64], the model's config implies [64, 64]"),
        (lambda t: [t.pop(k) for k in list(t) if "q_proj" in k], "is missing from the weights"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be(gptq, edit, said, tmp_path):
    edit_tensors(gptq, edit)
    message = refusal("import", gptq, "-o", tmp_path / "back.qtm")
    assert said in message
    assert sorted(os.listdir(tmp_path)) == ["gptq"]


@pytest.mark.parametrize(
    ("to", "change", "said"),
    [
        ("awq", {"version": "gemv"}, "version 'gemv': import knows 'gemm'"),
        ("awq", {"zero_point": False}, "zero_point False: import knows True"),
        ("awq", {"bits": 8}, "bits 8: must be 4"),
        ("compressed-tensors", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized': import knows"),
        ("compressed-tensors", {"quantization_status": "frozen"}, "quantization_status 'frozen': import knows"),
        ("compressed-tensors", {"config_groups": {}}, "config_groups {}: must have a group"),
    ],
)
def test_other_configs_that_are_not_known(tiny_files, to, change, said, tmp_path):
    folder = export(tiny_files.wide("llama", "--sym"), to, tmp_path / "out")
    edit_config(folder, lambda config: config.update(change))
    assert said in refusal("import", folder, "-o", tmp_path / "back.qtm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "float"}, "group_0: type 'float': import knows 'int'"),
        ({"strategy": "tensor"}, "group_0: strategy 'tensor': import knows 'group' or 'channel'"),
        ({"dynamic": True}, "group_0: dynamic True: import knows False"),
        ({"num_bits": 9}, "group_0: num_bits 9: must be 2, 3, 4, 5, 6, 7 or 8"),
        ({"symmetric": False}, "weight_zero_point is missing"),
    ],
)
def test_weights_of_compressed_tensors_that_are_not_known(tiny_files, change, said, tmp_path):
    folder = export(tiny_files.wide("llama", "--sym"), "compressed-tensors", tmp_path / "out")
    edit_config(folder, lambda config: config["config_groups"]["group_0"]["weights"].update(change))
    assert said in refusal("import", folder, "-o", tmp_path / "back.qtm")


@pytest.mark.parametrize(
    ("to", "file", "older"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_configs_from_before_config_json_had_a_place_for_them(tiny_files, to, file, older, tmp_path):
    """A symmetric grid's zeros are the same in both versions of GPTQ but for the 1 that the first one takes off."""
    version = ("--gptq-version", "1") if to == "gptq" else ()
    folder = export(tiny_files.wide("llama", "--sym"), to, tmp_path / "there", *version)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(older))
    import_(folder, tmp_path / "back.qtm")
    assert_same(tiny_files.wide("llama", "--sym"), tmp_path / "back.qtm")
    (folder / file).write_text("[1]")
    message = refusal("import", folder, "-o", tmp_path / "out.qtm")
    assert message == f"{folder / file}: not a JSON object but a list; download it again"


def test_what_is_no_quantized_model(tiny_files, tmp_path):
    message = refusal("import", tiny_files.model("llama"), "-o", tmp_path / "back.qtm")
    assert message.endswith("not quantized (no quantization_config); qtool compress is for it")
    message = refusal("import", tmp_path / "nothing", "-o", tmp_path / "back.qtm")
    assert message == f"{tmp_path / 'nothing'}: no such folder or .gguf file; import reads no other"
    shutil.copytree(tiny_files.model("llama"), tmp_path / "claims")
    config = json.loads((tmp_path / "claims/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "claims/config.json").write_text(json.dumps(config))
    message = refusal("import", tmp_path / "claims", "-o", tmp_path / "back.qtm")
    assert message.endswith("none of its linears is quantized; qtool compress is for such a model")


def test_an_output_that_exists(gptq, tmp_path):
    import_(gptq, tmp_path / "back.qtm")
    before = (tmp_path / "back.qtm").read_bytes()
    message = refusal("import", gptq, "-o", tmp_path / "back.qtm")
    assert message == f"{tmp_path / 'back.qtm'}: exists already; give another --output or --force"
    assert (tmp_path / "back.qtm").read_bytes() == before
    message = refusal("import", gptq, "-o", tmp_path / "no/back.qtm")
    assert message == f"{tmp_path / 'no/back.qtm'}: its folder does not exist; make it first"
    import_(gptq, tmp_path / "back.qtm", "--force")


@pytest.mark.parametrize("kind", ["gguf:q4_0", "gguf:q5_1", "gguf:q8_0"])
def test_a_gguf_file_there_and_back(tiny_files, kind, tmp_path):
    """Whatever encoding its numbers come back in, they are the same."""
    file, small = tmp_path / "out.qtm", ("--samples", "4", "--seq-len", "64", "--calibration", tiny_files.text)
    qtool_json("compress", tiny_files.wide_model("llama"), "-o", file, "--for", kind, *small)
    report = qtool_json("export", file, "--to", "gguf", "-o", tmp_path / "out.gguf")
    assert report["losses"] == [] and report["files"] == ["out.gguf"]
    assert import_(tmp_path / "out.gguf", tmp_path / "back.qtm")["decoded"] == {}
    with QtmFile.open(file) as one, QtmFile.open(tmp_path / "back.qtm") as other:
        for name, entry in one.tensors.items():
            a, b = (decode_tensor(opened, opened.tensors[name]) for opened in (one, other))
            assert torch.equal(a, b), name
            assert (entry.encoding.name == "dense") == (other.tensors[name].encoding.name == "dense")


def test_gguf_options_go_with_gguf(tiny_files, tmp_path):
    file = tiny_files.wide("llama", "--sym")
    message = refusal("export", file, "--to", "gptq", "-o", tmp_path / "out", "--gguf-type", "q8_0")
    assert message == "--gguf-type q8_0: is for --to gguf; leave it out"
    message = refusal("export", file, "--to", "gguf", "-o", tmp_path / "out.gguf", "--dtype", "float16")
    assert message == "--dtype float16: is not for --to gguf; leave it out"


def shuffled(tensors, places):
    """Groups that are formed by `places`, as act-order without static groups leaves them; codes stay where they are."""
    tensors[f"{Q_PROJ}.g_idx"] = (places // 32).int()


def test_groups_in_another_order_come_in_and_go_out_again(gptq, tmp_path):
    """The order within a group means nothing, and is that of the inputs."""
    places = torch.arange(64).mul(5).remainder(64)
    edit_tensors(gptq, lambda tensors: shuffled(tensors, places))
    assert import_(gptq, tmp_path / "back.qtm")["decoded"] == {}
    config, tensors = read_folder(gptq)
    with QtmFile.open(tmp_path / "back.qtm") as opened:
        layer = opened.layer(f"{Q_PROJ}.weight")
        assert np.array_equal(layer.input_order // 32, tensors[f"{Q_PROJ}.g_idx"].numpy())
        assert np.array_equal(layer.dequantize(), decode_gptq(config, Q_PROJ, tensors))
        assert opened.version == (1, 3)
    assert run_qtool("verify", tmp_path / "back.qtm").exit_code == 0
    again, found = read_folder(export(tmp_path / "back.qtm", "gptq", tmp_path / "again"))
    assert again["desc_act"] is True
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    for to in ("awq", "gguf"):
        message = refusal("export", tmp_path / "back.qtm", "--to", to, "-o", tmp_path / to)
        assert "another order than the inputs" in message
    lost = qtool_json("export", tmp_path / "back.qtm", "--to", "awq", "-o", tmp_path / "awq", "--lossy")["losses"]
    assert [loss["name"] for loss in lost] == [f"{Q_PROJ}.weight"] and lost[0]["error"] < 0.05


def test_groups_of_different_sizes_are_left_dense(gptq, tmp_path):
    edit_tensors(gptq, lambda tensors: tensors[f"{Q_PROJ}.g_idx"].copy_(torch.arange(64) // 40))
    result = import_(gptq, tmp_path / "back.qtm")
    assert result["decoded"] == {f"{Q_PROJ}.weight": "groups that are not of one size; stored as float32"}
    config, tensors = read_folder(gptq)
    with QtmFile.open(tmp_path / "back.qtm") as opened:
        assert np.array_equal(opened.dense(f"{Q_PROJ}.weight"), decode_gptq(config, Q_PROJ, tensors))
