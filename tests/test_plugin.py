"""transformers itself loads, runs, saves and refuses what `export --to transformers` writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from blockwise import some_ids
from invoke import qtool_json, refusal
from safetensors.torch import load_file, save_file
from tiny import PACKED_KINDS
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import qtool
from formats.errors import FormatError, KernelError
from formats.export import folder as folder_module
from formats.export.packed import export_packed
from formats.modules import QuantEmbedding, QuantLinear
from formats.plugin import QtoolConfig, QtoolQuantizer
from formats.reader import QtmFile

KINDS = [
    *PACKED_KINDS,
    ("mixtral", ("--method", "spqr", "--bits", "4", "--embeddings", "16")),
    ("llama", ("--target-bits", "5")),
]


@pytest.fixture
def exported(tiny_files, tmp_path):
    """Exports a tiny model: (file, folder)."""

    def export(family="llama", *options):
        file, folder = tiny_files.compressed(family, *options), tmp_path / "packed"
        qtool_json("export", file, "--to", "transformers", "-o", folder)
        return file, folder

    return export


def load_folder(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


@torch.no_grad()
def logits_of(model, dtype=torch.float32):
    return model(some_ids()).logits.to(dtype)


@pytest.mark.parametrize(("family", "options"), KINDS)
def test_logits_are_those_of_the_file_also_when_saved_again(exported, tmp_path, family, options):
    file, folder = exported(family, *options)
    want, model = logits_of(qtool.load(file)), load_folder(folder)
    assert torch.equal(logits_of(model), want)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load_folder(tmp_path / "again")), want)
    assert any(isinstance(module, QuantLinear) for module in model.modules())


def test_it_is_as_small_as_the_file(exported):
    file, folder = exported("llama", "--bits", "3")
    assert (folder / "model.safetensors").stat().st_size < file.stat().st_size


def test_a_tied_embedding_is_in_memory_once_and_on_disk_once(exported, tmp_path):
    _, folder = exported("llama")
    model = load_folder(folder)
    model.tie_weights()
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(embedding, QuantEmbedding)
    assert head.section.data_ptr() == embedding.packed.section.data_ptr()
    model.save_pretrained(tmp_path / "again")
    names = [load_file(path / "model.safetensors").keys() for path in (folder, tmp_path / "again")]
    assert names[0] == names[1]
    assert "lm_head.section" not in names[0]


def test_the_dtype_asked_for_is_that_of_activations(exported):
    file, folder = exported("llama")
    model = load_folder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert torch.equal(logits_of(model), logits_of(qtool.load(file, dtype=torch.bfloat16)))
    assert model.model.embed_tokens(some_ids()).dtype == torch.bfloat16


def test_pipelines_take_it(exported):
    file, folder = exported("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = pipeline("text-generation", load_folder(folder), tokenizer=tokenizer)(
        "the of", max_new_tokens=4, do_sample=False
    )
    want = qtool_json("generate", file, "--prompt", "the of", "--max-new-tokens", 4)
    assert text[0]["generated_text"] == "the of" + want["text"]


@pytest.mark.filterwarnings("default")  # of another project
def test_lm_eval_takes_it(exported):
    """By the folder's name, as its command line does; the score of an answer is the sum of its tokens' logarithms."""
    reason = "lm_eval is no dependency: pip install lm_eval"
    models = pytest.importorskip("lm_eval.models.huggingface", reason=reason, exc_type=ImportError)
    from lm_eval.api.instance import Instance

    file, folder = exported("llama")
    asked, answer = "the of", " and"
    taken = models.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    ((score, _),) = taken.loglikelihood([Instance("loglikelihood", {}, (asked, answer), 0)], disable_tqdm=True)
    ids = AutoTokenizer.from_pretrained(folder)(asked + answer, return_tensors="pt").input_ids
    with torch.no_grad():
        logs = qtool.load(file)(ids).logits[0, :-1].log_softmax(-1)
    want = logs.gather(1, ids[0, 1:, None])[-len(answer) :].sum()
    assert score == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("order", ["import qtool, transformers", "import transformers.quantizers.auto, qtool"])
def test_importing_qtool_is_enough_before_and_after_transformers(exported, order):
    _, folder = exported("llama")
    program = f"{order}; print(type(transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "LlamaForCausalLM", done.stderr


def test_looking_for_the_module_before_and_importing_it_again_do_no_harm():
    program = (
        "import importlib, importlib.util, sys, qtool; importlib.util.find_spec('transformers.quantizers.auto');"
        "import transformers.quantizers.auto as auto; importlib.reload(auto);"
        "print('qtool' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_importing_qtool_imports_no_transformers():
    program = "import sys, qtool; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def changed(folder, edit):
    """The folder with another quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"]["weights"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Q = "model.layers.0.self_attn.q_proj.weight"
HOSTILE = {
    "a tied one": (
        lambda weights: weights.update({"lm_head.weight": weights.pop("model.embed_tokens.weight")}),
        "'lm_head.weight': is tied to 'model.embed_tokens.weight'; it is stored under that name alone",
    ),
    "no such module": (
        lambda weights: weights.update({"nothing.weight": weights[Q]}),
        "'nothing.weight': the model's config has no such tensor (SPEC 3.4.1)",
    ),
    "no such weight": (
        lambda weights: weights.update(nothing=weights[Q]),
        "'nothing': the model's config has no such tensor (SPEC 3.4.1)",
    ),
    "a norm": (
        lambda weights: weights.update({"model.norm.weight": weights[Q] | {"shape": [32, 1]}}),
        "'model.norm.weight': the model's config implies shape [32] (SPEC 3.4.1)",
    ),
    "another shape": (
        lambda weights: weights[Q].update(shape=[1 << 40, 32]),
        f"'{Q}': the model's config implies shape [32, 32] (SPEC 3.4.1)",
    ),
    "no shape": (lambda weights: weights[Q].pop("shape"), f"'{Q}': shape=None: must be two positive numbers"),
    "no object": (lambda weights: weights.update({Q: 4}), f"'{Q}': its content is 4: must be an object"),
    "dense": (
        lambda weights: weights.update({Q: {"encoding": "dense", "dtype": "F32", "shape": [32, 32]}}),
        f"'{Q}': dense: is no matrix",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused(exported, case):
    edit, message = HOSTILE[case]
    _, folder = exported("llama")
    with pytest.raises(FormatError) as caught:
        load_folder(changed(folder, edit))
    assert str(caught.value).startswith(f"config.json: quantization_config: weights: {message}")


SECTION = Q.replace("weight", "section")
CHANGES = {
    "values that the encoding does not allow": (
        lambda section: torch.full_like(section, 0xFF),
        "a scale is NaN or infinite",
    ),
    "shorter": (lambda section: section[:-4].clone(), "must be"),
    "of another type": (lambda section: section.long(), "is I64"),
    "in two dimensions": (lambda section: section[None].clone(), "is U8 [1, "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hostile_section_is_refused_before_it_is_loaded(exported, change):
    edit, message = CHANGES[change]
    _, folder = exported("llama", "--bits", "4", "--outliers", "1%")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {SECTION: edit(tensors[SECTION])}, path, metadata={"format": "pt"})
    with pytest.raises(FormatError) as caught:
        load_folder(folder, ignore_mismatched_sizes=True)
    assert str(caught.value).startswith(f"{path}: {SECTION}: ") and message in str(caught.value)


def test_a_config_without_weights_is_refused(exported):
    _, folder = exported("llama")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weights"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"^config.json: quantization_config: weights: its content is None: must be"):
        load_folder(folder)


def test_a_section_that_is_missing_is_not_made_up(exported):
    _, folder = exported("llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[SECTION]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError) as caught:
        load_folder(folder)
    assert str(caught.value) == f"tensor {SECTION!r} is missing; config.json says that it is packed"


def test_a_folder_in_shards(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_SHARD_BYTES", 10_000)
    file = tiny_files.compressed("llama")
    names = qtool_json("export", file, "--to", "transformers", "-o", tmp_path / "packed")["files"]
    assert sum(name.endswith(".safetensors") for name in names) > 1
    assert torch.equal(logits_of(load_folder(tmp_path / "packed")), logits_of(qtool.load(file)))


def test_a_name_that_the_export_takes_itself_is_refused(tiny_files, tmp_path):
    with QtmFile.open(tiny_files.compressed("llama")) as file:
        file.files["model.safetensors"] = next(iter(file.files.values()))
        with pytest.raises(FormatError, match=r"file 'model.safetensors': has the name of what is exported$"):
            export_packed(file, tmp_path / "packed")


def test_no_reference_to_code_is_exported(tiny_files, tmp_path):
    with QtmFile.open(tiny_files.compressed("llama")) as file:
        file.header.model["config"]["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
        export_packed(file, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "auto_map" not in config and "quantization_config" in config


@pytest.mark.parametrize("device", [0, "cuda:0"])
def test_a_device_that_cannot_run_it_is_named(device):
    """transformers asks before it loads; with a device map it needs accelerate for it, so it is asked directly here."""
    with pytest.raises(KernelError, match=r"^device 'cuda:0': torch finds no GPU here; use cpu, or a torch that is"):
        QtoolQuantizer(QtoolConfig()).validate_environment(device_map={"": device, "lm_head": "cpu", "norm": "disk"})


def test_export_refuses_what_would_have_no_effect(tiny_files, tmp_path):
    command = ["export", tiny_files.compressed("llama"), "--to", "transformers", "-o", tmp_path / "packed"]
    message = "--dtype float16: is not for --to transformers; give it to from_pretrained, or leave it out"
    assert refusal(*command, "--dtype", "float16") == message
    assert not (tmp_path / "packed").exists()


def test_an_earlier_export_is_replaced_with_force(exported, tmp_path):
    file, folder = exported("llama")
    assert refusal("export", file, "--to", "transformers", "-o", folder).endswith(
        ": exists already; give another folder or --force"
    )
    shutil.copy(folder / "config.json", tmp_path / "before")
    qtool_json("export", file, "--to", "transformers", "-o", folder, "--force")
    assert (folder / "config.json").read_text() == (tmp_path / "before").read_text()
