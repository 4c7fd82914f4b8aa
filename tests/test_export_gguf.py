"""`export_gguf`: whole models, as transformers' own GGUF loader reads them, and what is refused in one line."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from invoke import qtool_json, refusal, run_qtool
from tiny import SIZES, make_model, silence
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import qtool
from calibration.corpus import calibration_windows
from formats.encoding import Uniform
from formats.errors import FormatError
from formats.export import gguf_tokenizer
from formats.export.gguf import export_gguf, inexact
from formats.export.gguf_model import GgufModel
from formats.layer import CodebookLinear
from formats.reader import QtmFile
from formats.section import pack
from formats.skeleton import config_from_dict
from formats.tensors import decode_tensor
from formats.writer import Writer
from qtool import importance as qtool_importance
from qtool.importance import measure_importance

WHOLE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
SUPER = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "num_hidden_layers": 1}
# What transformers' loader takes from its defaults, since it does not read the keys that llama.cpp has for it.
DEFAULTS = {"qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 256}, "mistral": {"sliding_window": None}}
EXACT = ("--method", "rtn", "--bits", "4", "--sym", "--group-size", "32", "--embeddings", "8")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A model of a family, compressed; made once for the same arguments."""
    silence()
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def compressed(family, sizes, *options):
        key = (family, str(sizes), options)
        if key not in made:
            model = make_model(family, folder / f"{family}{len(made)}", sizes=sizes)
            made[key] = folder / f"{family}{len(made)}.qtm"
            result = run_qtool("compress", model, "-o", made[key], *options)
            assert result.exit_code == 0, result.output
        return made[key]

    return compressed


def export(path, target, **options):
    with QtmFile.open(path) as file:
        return export_gguf(file, target, **options)


def with_nf4_embedding(path, target):
    """The same file but for the embedding, in levels that are no equal steps."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (260, 64)).astype(np.uint8), rng.random((260, 2)).astype(np.float16)
    layer = CodebookLinear(codes=codes, scales=scales, levels="nf4", bits=4, group_size=32)
    with QtmFile.open(path) as file, Writer(target) as writer:
        for name, entry in file.tensors.items():
            if name == "model.embed_tokens.weight":
                writer.add_tensor(name, entry.shape, layer.encoding, pack(layer))
            else:
                writer.add_tensor(name, entry.shape, entry.encoding, file.section(entry))
        for name in file.files:
            writer.add_file(name, file.read_file(name))
        header = file.header
        writer.finish(model=header.model, recipe=header.recipe, provenance=header.provenance, quality=header.quality)
    return target


def export_refusal(path, target, **options):
    """The message, which is one line; nothing is left behind."""
    with pytest.raises(FormatError) as caught:
        export(path, target, **options)
    assert list(target.parent.glob(f"*{target.stem}*gguf*")) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def keys(path):
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def logits(model):
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    return model(ids).logits.detach()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_transformers_loads_the_same_model(make, tmp_path, family):
    """Not close: the same logits, since the same weights go through the same arithmetic."""
    path = make(family, WHOLE | DEFAULTS.get(family, {}), *EXACT)
    report = export(path, tmp_path / "model.gguf")
    assert (report.files, report.losses) == (["model.gguf"], [])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(qtool.load(path)))
    ours, theirs = qtool.load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert theirs("the one é").input_ids == ours("the one é").input_ids
    messages = [{"role": "user", "content": "one"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "<s>one</s>"


def test_keys_and_types(make, tmp_path):
    path = make("llama", WHOLE, *EXACT)
    export(path, tmp_path / "tiny.gguf")
    found = keys(tmp_path / "tiny.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 260,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["tokenizer.ggml.tokens"][255:] == ["Ń", "<s>", "</s>", "<pad>", "[PAD259]"]
    assert found["tokenizer.ggml.token_type"][255:] == [1, 3, 3, 3, 5]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["output_norm.weight"] == "F32"
    assert types["blk.1.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "Q4_0"
    assert "output.weight" not in types  # the head is the embedding


@pytest.mark.parametrize("options", [("--bits", "3"), ("--bits", "4", "--asym"), ("--bits", "6", "--group-size", "64")])
def test_smallest_exact_type(make, tmp_path, options):
    """3 bits fit Q4_0; integers from -15 to 15 fit Q5_0, as a minimum of 16 bits fits few scales; 6 bits fit Q8_0."""
    path = make("llama", WHOLE | {"intermediate_size": 128}, "--method", "rtn", "--group-size", "32", "--sym", *options)
    assert export(path, tmp_path / "model.gguf").losses == []
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    down = stored["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == {"3": "Q4_0", "4": "Q5_0", "6": "Q8_0"}[options[1]]
    with QtmFile.open(path) as file:
        want = file.layer("model.layers.0.mlp.down_proj.weight").dequantize()
    assert np.array_equal(dequantize(down.data, down.tensor_type), want)


@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k", "q8_0"])
def test_lossy(make, tmp_path, kind):
    """What does not fit is fitted anew; rows that are no whole super-blocks fall back as in llama.cpp."""
    path = make("llama", SUPER, "--method", "rtn", "--bits", "6", "--group-size", "64", "--asym")
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    importance = {name: rng.random(256)}
    report = export(path, tmp_path / "model.gguf", gguf_type=kind, lossy=True, importance=importance)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    fallback = {"q4_k": "Q5_0", "q5_k": "Q5_1", "q6_k": "Q8_0", "q8_0": "Q8_0"}[kind]
    assert types["blk.0.ffn_down.weight"] == fallback
    if kind == "q8_0":  # integers of 7 bits and a sign
        assert report.losses == []
        return
    losses = {loss.name: loss for loss in report.losses}
    bound = {"q4_k": 8e-3, "q5_k": 2e-3, "q6_k": 6e-4}[kind]
    assert 0 < losses[name].error < bound
    down = losses.get("model.layers.0.mlp.down_proj.weight")
    assert (down is None) == (fallback == "Q8_0")
    assert down is None or down.reason.endswith(f"now {fallback}, as rows of 320 are no whole super-blocks of 256")
    assert sorted(inexact(QtmFile.open(path), kind)) == sorted(losses)


def test_what_does_not_fit_is_refused(make, tmp_path):
    path = make("llama", WHOLE, "--method", "rtn", "--bits", "4", "--format", "nf4", "--group-size", "32")
    message = export_refusal(path, tmp_path / "model.gguf")
    assert "14 tensors do not fit GGUF exactly; the worst, model.layers." in message
    assert "(weights are stored as codebook, not in equal steps; now Q5_0" in message
    assert message.endswith("of its energy; --lossy fits them anew")
    report = export(path, tmp_path / "model.gguf", lossy=True)
    assert len(report.losses) == 14 and max(loss.error for loss in report.losses) < 3e-3
    assert json.loads(json.dumps(report.to_dict()))["losses"][0]["name"].startswith("model.layers.")


def test_rows_that_are_no_blocks(make, tmp_path):
    path = make("llama", WHOLE | {"intermediate_size": 80}, *EXACT)
    assert "(rows of 80 are no whole blocks of 32; now F16)" in export_refusal(path, tmp_path / "model.gguf")
    export(path, tmp_path / "model.gguf", lossy=True)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == "F16"


@pytest.mark.parametrize("lossy", [False, True])
def test_an_embedding_that_does_not_fit(make, tmp_path, lossy):
    """It stays exact, or is rounded to 16 bits where losses are allowed; blocks are exact either way."""
    path = with_nf4_embedding(make("llama", WHOLE, *EXACT), tmp_path / "nf4.qtm")
    report = export(path, tmp_path / "model.gguf", lossy=lossy)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    embedding = stored["token_embd.weight"]
    assert embedding.tensor_type.name == ("F16" if lossy else "F32")
    with QtmFile.open(path) as file:
        want = file.layer("model.embed_tokens.weight").dequantize()
    assert np.array_equal(embedding.data, want.astype(embedding.data.dtype))
    assert [loss.name for loss in report.losses] == ["model.embed_tokens.weight"] * lossy
    assert all(0 < loss.error < 1e-6 and "codebook" in loss.reason for loss in report.losses)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        (
            "gpt2",
            {},
            "model_type='gpt2': there is no export to GGUF for it, only for llama, mistral, qwen2, qwen3, gem",
        ),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu': llama.cpp computes llama with 'silu' only"),
        ("gemma2", {"head_dim": 16}, "query_pre_attn_scalar=256: llama.cpp computes gemma2 with 16 only"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic': there is no export to GGUF for it",
        ),
    ],
)
def test_unknown_models(make, tmp_path, family, sizes, message):
    path = make(family, sizes if family == "gpt2" else WHOLE | sizes, "--method", "rtn", "--bits", "4")
    assert message in export_refusal(path, tmp_path / "model.gguf")


def sentencepiece():
    """A tokenizer as SentencePiece ones are converted: visible spaces, and bytes for what has no token."""
    words = [("t", "h"), ("▁", "o"), ("th", "e"), ("n", "e"), ("▁", "the"), ("▁o", "ne"), ("i", "n"), ("in", "g")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁thoneig"]
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in words)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=words, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def test_sentencepiece(tmp_path):
    """Merges become scores; what comes back reads text the same way."""
    tokenizer = sentencepiece()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "vocab_size": 290}
    model = make_model("llama", tmp_path / "model", sizes=WHOLE | ids)
    tokenizer.save_pretrained(model)
    assert run_qtool("compress", model, "-o", tmp_path / "a.qtm", *EXACT).exit_code == 0
    export(tmp_path / "a.qtm", tmp_path / "a.gguf")
    found = keys(tmp_path / "a.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert [scores[token] for token in ("th", "▁o", "▁the", "<0x41>", "i")] == [0, -1, -4, 0, -10000]
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert [types[token] for token in ("<unk>", "<s>", "<0x41>", "th", "[PAD289]")] == [2, 3, 6, 1, 5]
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("the one", "nothing, thing é"):
        assert loaded(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids, text


def test_tokenizers_that_gguf_has_no_keys_for(make, tmp_path):
    backend = sentencepiece().backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    with pytest.raises(FormatError, match=r"tokenizer with 'Lowercase': llama.cpp has no such step"):
        gguf_tokenizer.tokenizer_values(PreTrainedTokenizerFast(tokenizer_object=backend), 290, None)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(FormatError, match=r"tokenizer of type 'WordLevel': there is no export to GGUF for it"):
        gguf_tokenizer.tokenizer_values(PreTrainedTokenizerFast(tokenizer_object=words), 290, None)
    with pytest.raises(FormatError, match=r"tokenizer: its largest id is 274, the model has 100 embeddings"):
        gguf_tokenizer.tokenizer_values(sentencepiece(), 100, None)


def test_several_ends_and_templates():
    """A second id that ends a text is that of a turn; templates have names."""
    tokenizer = sentencepiece()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    found = gguf_tokenizer.tokenizer_values(tokenizer, 290, GenerationConfig(eos_token_id=[2, 7]))
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 7)
    assert found["tokenizer.chat_template"] == "a" and found["tokenizer.chat_template.tool_use"] == "b"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_importance_is_what_the_blocks_see(make):
    """The mean square of each input, of the model that transformers runs on the same windows."""
    path = make("llama", WHOLE, *EXACT)
    found = measure_importance(path, n_windows=2, seq_len=32)
    model, seen = qtool.load(path), {}

    def hook(name):
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0].detach())

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    tokenizer = qtool.load_tokenizer(path)
    windows = calibration_windows(
        "builtin", lambda text: list(tokenizer(text, verbose=False).input_ids), n_samples=2, seq_len=32, seed=0
    )
    model(torch.from_numpy(windows.ids))
    assert found.keys() == seen.keys() and len(found) == 14
    for name, (inputs,) in seen.items():
        want = inputs.reshape(-1, inputs.shape[-1]).square().mean(dim=0)
        np.testing.assert_allclose(found[name], want.numpy(), rtol=1e-4)


def test_unknown_type(make, tmp_path):
    message = export_refusal(make("llama", WHOLE, *EXACT), tmp_path / "model.gguf", gguf_type="iq4_nl")
    assert message.startswith("gguf_type='iq4_nl': must be one of q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, ")


def test_target(make, tmp_path):
    """What exists is replaced when that is asked for, and only a file."""
    path, target = make("llama", WHOLE, *EXACT), tmp_path / "model.gguf"
    export(path, target)
    before = target.read_bytes()
    with pytest.raises(FormatError, match="exists already; give another name or --force"):
        export(path, target)
    export(path, target, overwrite=True)
    assert target.read_bytes() == before
    with pytest.raises(FormatError, match=r"is a folder; give the name of a .gguf file"):
        export(path, tmp_path, overwrite=True)
    with pytest.raises(FormatError, match="its folder does not exist; make it first"):
        export(path, tmp_path / "none" / "model.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


def test_a_broken_off_export_leaves_nothing(make, tmp_path, monkeypatch):
    from formats.export import gguf

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf._Export, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        export(make("llama", WHOLE, *EXACT), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def gguf_model(family, **sizes):
    config = config_from_dict({"model_type": family, **SIZES, **WHOLE, **sizes})
    return GgufModel(config, "model.layers")


def test_names_are_those_of_the_gguf_package():
    from gguf import MODEL_ARCH, get_tensor_name_map

    from formats.export.gguf_model import ARCHITECTURES
    from formats.skeleton import build_skeleton, parameter_names

    for family, architecture in ARCHITECTURES.items():
        theirs = get_tensor_name_map(MODEL_ARCH[architecture.name.upper()], 6)
        sizes = {"query_pre_attn_scalar": 16} if family.startswith("gemma") else {}
        config = config_from_dict({"model_type": family, **SIZES, **WHOLE, "num_hidden_layers": 6, **sizes})
        model = GgufModel(config, "model.layers")
        for name in parameter_names(build_skeleton(config)):
            owner, _, leaf = name.rpartition(".")
            assert model.tensor_name(name) == f"{theirs.get_name(owner)}.{leaf}", name
    with pytest.raises(FormatError, match=r"'model.layers.0.router.weight': llama has none like it in GGUF"):
        gguf_model("llama").tensor_name("model.layers.0.router.weight")


def test_rope_of_llama_3():
    """How far every frequency is slowed is what transformers makes of it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = gguf_model("llama", head_dim=64, rope_parameters=rope)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](model._config, "cpu")
    plain = 1 / 5e5 ** (np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / model.extra_tensors()["rope_freqs.weight"], slowed.numpy(), rtol=1e-5)


def test_scaled_rope_and_windows():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    values = gguf_model("qwen2", rope_parameters=yarn).values()
    assert values["qwen2.rope.scaling.type"] == "yarn" and values["qwen2.rope.scaling.factor"] == 4
    assert values["qwen2.rope.scaling.original_context_length"] == 64
    assert gguf_model("mistral", sliding_window=16).values()["llama.context_length"] == 16  # where it changes nothing
    gemma = gguf_model("gemma2", sliding_window=16, head_dim=256).values()
    assert (gemma["gemma2.attention.sliding_window"], gemma["gemma2.context_length"]) == (16, 128)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([BYTES | {"use_regex": True}], False, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], False, "smollm"),
        ([split(LLAMA3), BYTES], True, "llama-bpe"),
        ([split(LLAMA3.replace("{1,3}", "")), BYTES], False, "qwen2"),
        ([split(r"\d+"), BYTES], False, None),
        ([BYTES | {"use_regex": True, "add_prefix_space": True}], False, None),
        ([{"type": "Whitespace"}], False, None),
    ],
)
def test_how_text_is_split(steps, ignore_merges, name):
    parts = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"ignore_merges": ignore_merges},
    }
    if name is not None:
        assert gguf_tokenizer._split_name(parts) == name
        return
    with pytest.raises(FormatError, match=r"llama.cpp has no name for how it splits text"):
        gguf_tokenizer._split_name(parts)


def test_out_and_back_on_the_command_line(make, tmp_path):
    """`export --to gguf`, `import`: the same codes and scales, and what both say of it."""
    file, model = make("llama", WHOLE, *EXACT), tmp_path / "model.gguf"
    printed = qtool_json("export", file, "--to", "gguf", "-o", model)
    assert printed == {"folder": str(model), "to": "gguf", "files": ["model.gguf"], "losses": []}
    back = qtool_json("import", model, "-o", tmp_path / "back.qtm")
    assert back["decoded"] == {}
    with QtmFile.open(file) as one, QtmFile.open(tmp_path / "back.qtm") as other:
        assert back["packed"] == sum(isinstance(e.encoding, Uniform) for e in one.tensors.values())
        for name, entry in one.tensors.items():
            if isinstance(entry.encoding, Uniform) and entry.encoding.bits == 4:
                assert pack(one.layer(name)) == pack(other.layer(name)), name
            assert torch.equal(decode_tensor(one, entry), decode_tensor(other, other.tensors[name])), name


def test_what_is_fitted_anew_is_weighted_by_what_the_inputs_are(make, tmp_path, monkeypatch):
    file, seen = make("llama", SUPER, "--method", "rtn", "--bits", "4"), []
    real = qtool_importance.measure_importance
    monkeypatch.setattr(qtool_importance, "measure_importance", lambda *a, **k: seen.append(k) or real(*a, **k))
    lossy = ("export", file, "--to", "gguf", "--gguf-type", "q4_k", "--lossy", "--calibration", "builtin")
    printed = qtool_json(*lossy, "-o", tmp_path / "model.gguf")
    assert seen == [{"source": "builtin"}]
    assert printed["losses"] and all(0 < loss["error"] < 0.02 for loss in printed["losses"])
    assert run_qtool("import", tmp_path / "model.gguf", "-o", tmp_path / "back.qtm").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "gguf", "--dtype", "float16"), "--dtype float16: is not for --to gguf; leave it out"),
        (("--to", "dense", "--gguf-type", "q4_k"), "--gguf-type q4_k: is for --to gguf; leave it out"),
        (("--to", "awq", "--calibration", "builtin"), "--calibration builtin: is for --to gguf; leave it out"),
        (("--to", "gguf", "--calibration", "builtin"),
         "--calibration builtin: is for what is rounded again; give --lossy too"),
    ],
)  # fmt: skip
def test_options_of_another_format(make, tmp_path, options, message):
    assert refusal("export", make("llama", WHOLE, *EXACT), *options, "-o", tmp_path / "out") == message
    assert not list(tmp_path.iterdir())
