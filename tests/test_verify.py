"""`qtool verify --against`: every layer's error again, from the model and the text the file was made from."""

from __future__ import annotations

import pytest
from invoke import qtool_json, refusal, run_qtool
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model

from formats.reader import QtmFile
from formats.writer import Writer


def against(tiny_files, family="llama", *options):
    return ("--against", tiny_files.model(family), "--calibration", tiny_files.text, *options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_error_comes_out_as_recorded(tiny_files, family):
    file = tiny_files.compressed(family)
    found = qtool_json("verify", file, *against(tiny_files, family))
    recorded = {row["name"]: row["relative_error"] for row in qtool_json("inspect", file)["tensors"]}
    assert {row["name"] for row in found["layers"]} == {name for name, error in recorded.items() if error is not None}
    for row in found["layers"]:
        assert row["ok"] and row["recorded"] == recorded[row["name"]]
        assert row["recomputed"] == pytest.approx(row["recorded"], rel=1e-3)


@pytest.mark.parametrize("options", [("--method", "rtn"), ("--bits", "3", "--sym"), ("--calibration", "self")])
def test_other_recipes(tiny_files, options):
    file = tiny_files.compressed("llama", *options)
    source = () if options[0] == "--calibration" else ("--calibration", tiny_files.text)
    result = run_qtool("verify", file, "--against", tiny_files.model("llama"), *source)
    assert result.exit_code == 0 and "the errors of 21 layers are as recorded" in result.stdout


def test_another_model(tiny_files, tmp_path):
    other = make_model("llama", tmp_path / "other", seed=2)
    message = refusal("verify", tiny_files.compressed("llama"), "--against", other, "--calibration", tiny_files.text)
    assert f"against {other}: " in message and message.endswith("not made from this model")


def test_a_model_of_another_shape(tiny_files):
    message = refusal("verify", tiny_files.compressed("llama"), *against(tiny_files, "gpt2"))
    assert message.endswith("is not in both model and file; not one model")


def test_another_text(tiny_files, tmp_path):
    file, other = tiny_files.compressed("llama"), tmp_path / "other.txt"
    other.write_text(tiny_files.text.read_text()[::-1])
    message = refusal("verify", file, "--against", tiny_files.model("llama"), "--calibration", other)
    expected = f"{other}: is not the text that {file} was calibrated on (text.txt); give that one by --calibration"
    assert message == expected
    missing = refusal("verify", file, "--against", tiny_files.model("llama"))
    assert missing == f"{file}: was calibrated on text.txt; give that text by --calibration"


def test_one_weight_changed_in_the_model(tiny_files, tmp_path):
    model = make_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] *= 3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refusal("verify", tiny_files.compressed("llama"), "--against", model, "--calibration", tiny_files.text)
    assert "tensor 'model.layers.1.mlp.down_proj.weight' against" in message and "recorded is" in message


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.v_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_file_whose_hashes_are_right_and_whose_weights_are_not(tiny_files, tmp_path, name):
    """Who can change a file can hash it: the error against the model tells."""
    forged = tmp_path / "forged.qtm"
    with QtmFile.open(tiny_files.compressed("llama")) as file, Writer(forged) as writer:
        for entry in file.header.tensors:
            data = bytearray(file.section(entry))
            if entry.name == name:
                data[0] ^= 0xFF
            options = {"relative_error": entry.relative_error, "transposed": entry.transposed}
            writer.add_tensor(entry.name, entry.shape, entry.encoding, data, **options)
        for embedded in file.header.files:
            writer.add_file(embedded.name, file.section(embedded))
        header = file.header
        writer.finish(model=header.model, recipe=header.recipe, provenance=header.provenance, quality=header.quality)
    assert run_qtool("verify", forged).exit_code == 0
    assert f"tensor {name!r} against " in refusal("verify", forged, *against(tiny_files))
