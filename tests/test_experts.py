"""Mixtures of experts, each kind that transformers fuses: every expert is solved on the tokens that reach it."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager

import pytest
import torch
from blockwise import blockwise_logits, some_ids
from invoke import qtool_json, refusal, run_qtool
from safetensors import safe_open
from tiny import EXPERTS, load_reference

import qtool
from calibration.capture import HessianCapture
from formats.encoding import Dense
from formats.experts import SeparateExperts, expert_of, fuse_experts, mixtures
from formats.header import TensorEntry
from formats.reader import QtmFile
from formats.skeleton import build_skeleton
from formats.tensors import decode_tensor
from formats.writer import Writer
from qtool import mixture as mixture_module
from qtool.checkpoint import open_checkpoint
from qtool.commands import _counted
from qtool.mixture import Mixture, RoutedTokens
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32
from qtool.runlog import RunReport
from qtool.states import HiddenStates
from qtool.ternary import bits_warning

SOME = ("--min-expert-tokens", "8")
KINDS = sorted(EXPERTS.keys() - {"mixtral", "gpt_oss"})  # test_families.py takes these two apart in more ways


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_goes_all_the_way(tiny_files, family, tmp_path):
    """compress, load, eval, generate, verify --against, and both exports."""
    folder, ids = tiny_files.model(family), some_ids(batch=2)
    file = tiny_files.compressed(family)
    with exact_float32():
        torch.testing.assert_close(blockwise_logits(folder, ids), load_reference(folder)(ids).logits, rtol=0, atol=1e-5)
        loaded = qtool.load(file)(ids).logits
    torch.testing.assert_close(loaded, blockwise_logits(file, ids), rtol=0, atol=1e-5)

    quality = qtool_json(
        "eval", "perplexity", file, "--baseline", folder, "--data", tiny_files.text, "--seq-len", 64
    )  # fmt: skip
    assert quality["perplexity"] == pytest.approx(quality["baseline_perplexity"], rel=0.1)
    assert qtool_json("generate", file, "--prompt", "the", "--max-new-tokens", 3)["text"]
    layers = qtool_json("verify", file, "--against", folder, "--calibration", tiny_files.text)["layers"]
    assert sum(".experts." in layer["name"] for layer in layers) == 2 * sum(
        module.n_experts for _, module in mixtures(qtool.load(file))
    )
    for kind in ("dense", "transformers"):
        assert run_qtool("export", file, "--to", kind, "-o", tmp_path / kind).exit_code == 0
        with exact_float32():
            exported = load_reference(tmp_path / kind)(ids).logits
        torch.testing.assert_close(exported, loaded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
def test_all_matrices_of_all_experts_are_quantized(tiny_files, family):
    found = qtool_json("inspect", tiny_files.compressed(family))
    of_experts = [row for row in found["tensors"] if ".experts." in row["name"] and len(row["shape"]) == 2]
    assert of_experts and all(row["encoding"] == "uniform" for row in of_experts)
    routers = [
        row
        for row in found["tensors"]
        if row["name"].endswith(("mlp.gate.weight", "router.weight", "router.proj.weight"))
    ]
    assert routers and all(row["encoding"] == "dense" for row in routers)


def _first_mixture(family, tiny_files, tmp_path):
    """The first block with a mixture, ready to be calibrated: (mixture, states, the whole block's statistics)."""
    model = BlockwiseModel(open_checkpoint(str(tiny_files.model(family))))
    ids = some_ids(batch=3)
    states = HiddenStates(tmp_path, ids, 2)
    index = next(i for i in range(len(model.blocks)) if model.mixture(i))
    with model.outside(head=False):
        hidden = model.embed(ids)
        model.learn_calls(states.batches)
    for before in range(index):
        with model.block(before):
            hidden = torch.cat([model.run(before, x) for x in hidden.split(2)])
    states.write(index, hidden.split(2))
    with model.block(index):
        stats = HessianCapture(model.linears(index)).run(lambda x: model.run(index, x), states.read(index))
        want = torch.cat([model.run(index, x) for x in states.read(index)])
    return Mixture(model, index, model.mixture(index)), states, stats, want


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_an_experts_statistics_and_outputs_are_those_of_the_whole_block(tiny_files, family, tmp_path, monkeypatch):
    """A few experts in memory at a time, tokens on disk, against the block as transformers runs it."""
    monkeypatch.setattr(mixture_module, "MAX_SHARE", 1000)
    monkeypatch.setattr(mixture_module, "BATCH_ELEMENTS", 10000)  # one or two experts
    with exact_float32():
        mixture, states, stats, want = _first_mixture(family, tiny_files, tmp_path)
        assert 1 <= len(next(mixture.batches(range(4)))) < 4
        seen = {}
        with mixture.model.block(mixture.index, experts=False):
            tokens = RoutedTokens(mixture, states)
            assert tokens.visit(0, lambda names, found: seen.update(found)) == [
                n for n, count in enumerate(tokens.counts) if not count
            ]
            with tokens.replayed():
                given = torch.cat([mixture.model.run(mixture.index, x) for x in states.read(mixture.index)])
    torch.testing.assert_close(given, want, rtol=0, atol=1e-5)
    reached = {name for name in stats if ".experts." in name}
    assert reached
    for name in reached:
        assert seen[name].n_tokens == stats[name].n_tokens
        torch.testing.assert_close(seen[name].hessian, stats[name].hessian)
        torch.testing.assert_close(seen[name].absmax, stats[name].absmax)
    assert sum(tokens.counts) == 3 * 48 * 2  # two experts a token
    tokens.remove()
    assert not list(tmp_path.glob("experts.*"))


def test_an_expert_that_a_token_chose_twice_counts_twice(tiny_files, tmp_path):
    with exact_float32():
        mixture, states, _, _ = _first_mixture("mixtral", tiny_files, tmp_path)
        with mixture.model.block(mixture.index, experts=False):
            tokens = RoutedTokens(mixture, states)
            x = torch.from_numpy(tokens._inputs.copy())
            chosen, weights = torch.tensor([[1, 1]]).repeat(len(x), 1), torch.tensor([[0.25, 0.5]]).repeat(len(x), 1)
            tokens._route(chosen, weights)
            tokens.visit(0, lambda names, found: None)
            with mixture.in_memory([1]):
                torch.testing.assert_close(torch.from_numpy(tokens._outputs), 0.75 * mixture.experts.run(1, x))


def test_a_disk_that_is_full_is_an_error_of_the_mixture(tiny_files, tmp_path, monkeypatch):
    """Not a crash when its file, which is mapped, is written to."""

    def full(descriptor, offset, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mixture_module.os, "posix_fallocate", full)
    message = refusal("compress", tiny_files.model("mixtral"), "-o", tmp_path / "a.qtm", *tiny_files.compress_options())
    assert message.startswith(f"{tmp_path}/a.qtm.work/experts.outputs: No space left on device; ")
    assert message.endswith("make room and run again")


def test_an_expert_with_few_tokens_is_calibrated_on_those_of_all(tiny_files, tmp_path):
    with exact_float32():
        mixture, states, stats, _ = _first_mixture("qwen2_moe", tiny_files, tmp_path)
        seen = {}
        with mixture.model.block(mixture.index, experts=False):
            tokens = RoutedTokens(mixture, states)
            least = sorted(tokens.counts)[3]
            few = tokens.visit(least, lambda names, found: seen.update(found))
    assert sorted(few) == [n for n, count in enumerate(tokens.counts) if count < least] and few
    up = seen[f"{mixture.name}.{few[0]}.gate_up_proj"]
    torch.testing.assert_close(up.hessian, stats[f"{mixture.name.rpartition('.')[0]}.shared_expert.up_proj"].hessian)
    downs = [stats[f"{mixture.name}.{n}.down_proj"] for n in range(8) if tokens.counts[n]]
    pooled = sum(one.hessian * one.n_tokens for one in downs) / sum(one.n_tokens for one in downs)
    torch.testing.assert_close(seen[f"{mixture.name}.{few[0]}.down_proj"].hessian, pooled)


def test_a_popular_expert_counts_four_times_the_mean_at_most(tiny_files, tmp_path):
    with exact_float32():
        mixture, states, _, _ = _first_mixture("mixtral", tiny_files, tmp_path)
        with mixture.model.block(mixture.index, experts=False):
            tokens = RoutedTokens(mixture, states)
            rows = torch.arange(144).repeat(2)
            tokens._rows = (rows, rows[:0], rows[:0], rows[:0])
            for n_experts, most in ((4, 288), (16, 4 * 288 // 16)):
                tokens.counts = [288] + [0] * (n_experts - 1)
                with mixture.in_memory([0]):
                    assert tokens._statistics(0)[0].n_tokens == most


def test_the_file_says_what_reached_each_expert(tiny_files, tmp_path):
    file = tiny_files.compressed("qwen2_moe", *SOME)
    found = qtool_json("inspect", file, "--experts")
    rows, quality = found["experts"], found["quality"]["experts"]
    assert len(rows) == 3 * 8
    for name, counted in quality.items():
        of_one = [row for row in rows if row["mixture"] == name]
        assert [row["tokens"] for row in of_one] == counted["tokens"]
        assert sum(counted["tokens"]) == 4 * 64 * 2  # windows, tokens, two experts each
        assert {row["expert"] for row in of_one if row["statistics"] == "all"} == set(counted["pooled"])
        assert counted["pooled"] == [n for n, count in enumerate(counted["tokens"]) if count < 8]
    assert all(row["error"] > 0 and 4 < row["bits"] < 8 for row in rows)
    text = run_qtool("inspect", file, "--experts").stdout
    assert "experts          24 in 3 blocks" in text
    assert f"{rows[0]['mixture']}: 8 experts" in text


def test_without_calibration_no_tokens_are_told(tiny_files):
    file = tiny_files.compressed("mixtral", "--method", "rtn")
    rows = qtool_json("inspect", file, "--experts")["experts"]
    assert {(row["tokens"], row["statistics"]) for row in rows} == {(None, None)}


def test_a_model_without_experts_has_none_to_list(tiny_files):
    assert refusal("inspect", tiny_files.compressed("llama"), "--experts") == "--experts: the file's model has none"


def test_bits_of_experts_and_of_the_rest(tiny_files):
    file = tiny_files.compressed("mixtral", "--bits", "8", "--layer", r"[.]experts[.]=3", "--layer", "o_proj=5")
    bits = {row["name"]: row["bits"] for row in qtool_json("inspect", file)["tensors"]}
    assert bits["model.layers.1.mlp.experts.2.down_proj.weight"] == 3
    assert bits["model.layers.1.self_attn.o_proj.weight"] == 5
    assert bits["model.layers.1.self_attn.q_proj.weight"] == 8


def test_a_target_spreads_bits_over_experts(tiny_files):
    file = tiny_files.compressed("mixtral", "--target-bits", "5", "--format", "int")
    assert 4.9 < qtool_json("inspect", file)["bits_per_weight"] <= 5


@pytest.mark.parametrize("fused", [False, True])
def test_experts_are_read_however_they_are_stored(tiny_files, tmp_path, fused):
    """A tensor for each expert's projection, as published, or one of all experts, as transformers holds them."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_files.model("mixtral"), folder)
    if fused:
        from safetensors.torch import save_file

        state = load_reference(folder).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    ids = some_ids()
    with exact_float32():
        want = load_reference(tiny_files.model("mixtral"))(ids).logits
    torch.testing.assert_close(blockwise_logits(folder, ids), want, rtol=0, atol=1e-5)
    assert open_checkpoint(str(folder)).unused() == []


def test_a_missing_expert_is_named(tiny_files, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_files.model("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("w1", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"]
    save_file(tensors, folder / "model.safetensors")
    message = refusal("compress", folder, "-o", tmp_path / "out.qtm", *tiny_files.compress_options())
    assert "tensor model.layers.1.mlp.experts.2.gate_up_proj.weight is missing from the weights" in message


def test_fewer_experts_than_the_config_says_are_refused(tiny_files, tmp_path):
    """All in one tensor, as transformers holds them."""
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_files.model("mixtral"), folder)
    state = load_reference(folder).state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    state[name] = state[name][:3]
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    message = refusal("compress", folder, "-o", tmp_path / "out.qtm", *tiny_files.compress_options())
    assert message.startswith(f"{folder}: cannot read the weights: ")


def test_exported_experts_have_their_published_names(tiny_files, tmp_path):
    """transformers fuses experts when it loads them; on disk every expert has its own tensors."""
    file = tiny_files.compressed("mixtral")
    assert run_qtool("export", file, "--to", "dense", "-o", tmp_path / "dense").exit_code == 0
    with safe_open(tmp_path / "dense" / "model.safetensors", framework="pt") as stored:
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in stored.keys()  # noqa: SIM118


def test_numbers_beyond_the_last_expert_stand_for_none():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    fused = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3))
    weights = {name: torch.randn_like(p) for name, p in fused.named_parameters()}
    fused.load_state_dict(weights)
    x, routes = torch.randn(5, 8), torch.tensor([[0, 2], [3, 1], [3, 3], [2, 0], [1, 3]])
    gates = torch.rand(5, 2)
    want = fused(x, routes, gates)
    apart = SeparateExperts(fused)
    state = {f"{e}.{n}.weight": tensor[e] for n, tensor in weights.items() for e in range(3)}
    apart.load_state_dict(state, assign=True)
    torch.testing.assert_close(apart(x, routes, gates), want)
    outer = torch.nn.Module()
    outer.experts = apart
    again = fuse_experts(outer, {f"experts.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(again["experts.gate_up_proj"], weights["gate_up_proj"])


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(tiny_files, output, monkeypatch):

    options = tiny_files.compress_options(*SOME)
    command = ["compress", tiny_files.model("qwen2_moe"), "-o", output, *options]
    calls = []

    def advance(model, index, states):
        calls.append(index)
        if index == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, index, states)

    real = mixture_module.advance
    monkeypatch.setattr(mixture_module, "advance", advance)
    assert run_qtool(*command).exit_code != 0
    again = run_qtool(*command)
    assert again.exit_code == 0, again.output
    assert calls == [0, 1, 1, 2]
    assert output.read_bytes() == tiny_files.compressed("qwen2_moe", *SOME).read_bytes()
    with QtmFile.open(output) as file:
        assert len(file.header.quality["experts"]) == 3


def test_more_tensors_than_a_file_holds_are_refused_before_anything_is_done(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setattr("formats.strict_json.MAX_ENTRIES", 50)
    folder = tiny_files.model("qwen2_moe")
    message = refusal("compress", folder, "-o", tmp_path / "out.qtm", *tiny_files.compress_options())
    assert message.startswith(f"{folder}: has ") and message.endswith("; a file of its size holds 50 (SPEC 4.1.1)")
    assert not list(tmp_path.iterdir())


def test_a_target_size_of_a_mixture_is_kept(tiny_files):
    """What the header says of the experts is counted before it is known."""
    file = tiny_files.compressed("mixtral", "--target-size", "110kB", "--format", "int")
    assert file.stat().st_size <= 110_000


def test_linears_behind_the_mixture_are_calibrated_on_what_it_gives(tiny_files, tmp_path):
    """Gemma 4's per-layer inputs are gated by the block's own output."""
    file = tiny_files.compressed("gemma4_text")
    found = {row["name"]: row for row in qtool_json("inspect", file)["tensors"]}
    late = found["model.layers.0.per_layer_input_gate.weight"]
    assert late["encoding"] == "uniform" and late["relative_error"] > 0
    options = ("--against", tiny_files.model("gemma4_text"), "--calibration", tiny_files.text)
    assert qtool_json("verify", file, *options)["ok"]


def test_spec_2_3_3_a_file_whose_experts_are_one_tensor_is_read(tiny_files, tmp_path):
    """As files were before experts were taken apart: dense tensors [experts, ...]; so are folders made of them."""
    apart, fused = tiny_files.compressed("mixtral"), tmp_path / "fused.qtm"
    model = build_skeleton(open_checkpoint(str(apart)).config)
    with QtmFile.open(apart) as file, Writer(fused) as writer:
        names = [name for name in file.tensors if ".experts." in name]
        whole = fuse_experts(model, {name: decode_tensor(file, file.tensors[name]) for name in names})
        for name, tensor in whole.items():
            writer.add_tensor(name, tuple(tensor.shape), Dense("F32"), tensor.numpy())
        for entry in file.header.tensors:
            if entry.name not in names:
                writer.add_tensor(entry.name, entry.shape, entry.encoding, file.section(entry))
        for name in file.files:
            writer.add_file(name, file.read_file(name))
        header = file.header
        writer.finish(
            model=header.model, recipe=header.recipe, provenance=header.provenance, quality=header.quality
        )  # fmt: skip
    ids = some_ids()
    with exact_float32():
        want = qtool.load(apart)(ids).logits
        torch.testing.assert_close(qtool.load(fused)(ids).logits, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(blockwise_logits(fused, ids), want, rtol=0, atol=1e-5)
        for kind in ("dense", "transformers"):
            assert run_qtool("export", fused, "--to", kind, "-o", tmp_path / kind).exit_code == 0
            torch.testing.assert_close(load_reference(tmp_path / kind)(ids).logits, want, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "transformers" / "model.safetensors", framework="pt") as stored:
        assert "model.layers.0.mlp.experts.down_proj" in stored.keys()  # noqa: SIM118
    assert run_qtool("verify", fused).exit_code == 0


def test_more_layers_than_a_header_has_room_for_are_told_by_mixture():
    names = [f"m.{n}.experts.{e}.down_proj.weight" for n in range(2) for e in range(600)]
    report = RunReport(
        harder_damped={name: i / 8 for i, name in enumerate(names)} | {"m.0.q.weight": 0.5},
        dropped_tokens=dict.fromkeys(names[:1000], 3),
        rounded=names,
    )
    quality = report.quality()
    assert quality["harder_damped"] == {"m.0.experts": 599 / 8, "m.1.experts": 1199 / 8, "m.0.q.weight": 0.5}
    assert quality["dropped_tokens"] == report.dropped_tokens  # these there is room for
    assert quality["rounded"] == ["m.0.experts", "m.1.experts"] and quality["uncalibrated"] == []
    mixtures = {"m.0.experts": {}, "m.1.experts": {}}
    assert _counted(quality["harder_damped"], mixtures) == "1 layers and experts of 2 blocks"
    assert _counted(quality["dropped_tokens"], mixtures) == "1000 layers"


def test_bits_below_one_are_held_against_what_the_experts_take(tiny_files, tmp_path):
    """Rows of a tiny model are short: two values for each cost it a bit a weight."""
    options = tiny_files.compress_options("--format", "int")
    lines = {}
    for bits in ("0.8", "0.99"):
        out = tmp_path / f"{bits}.qtm"
        done = run_qtool("compress", tiny_files.model("mixtral"), "-o", out, *options, "--bits", bits)
        assert done.exit_code == 0, done.output
        lines[bits] = [line for line in done.stderr.splitlines() if line.startswith("--bits")]
    rows = [row for row in qtool_json("inspect", out)["tensors"] if row["encoding"].startswith("ternary")]
    took = 8 * sum(row["bytes"] for row in rows) / sum(row["shape"][0] * row["shape"][1] for row in rows)
    assert took > 0.99
    for bits, [line] in lines.items():
        assert line.startswith(f"--bits {bits}: ternary layers take {took:.3f} bits a weight: ")
    first = next(
        line for line in run_qtool("inspect", out, "--tensors").stdout.splitlines() if line.startswith(rows[0]["name"])
    )
    assert f"  {8 * rows[0]['bytes'] / (rows[0]['shape'][0] * rows[0]['shape'][1]):.2f}  " in first


def test_bits_that_are_kept_need_no_word():
    entry = TensorEntry("w", (64, 64), Dense("F16"), 256, 8192, "0" * 64)
    assert bits_warning([(entry, 0.5)], 16.0) is None and bits_warning([], 0.8) is None
    assert bits_warning([(entry, 0.5)], 15.9) == (
        "--bits 15.9: ternary layers take 16.000 bits a weight: 50.0% of them are zero, and that alone decides; "
        "--ternary-grid minmax leaves the most"
    )


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_eval_has_few_experts_in_memory(tiny_files, monkeypatch, kind):
    """Whatever their number in a block; the figures are those of the whole block at once, as transformers runs it."""
    model = tiny_files.model("qwen2_moe") if kind == "folder" else tiny_files.compressed("qwen2_moe")
    measure = ("eval", "perplexity", model, "--data", tiny_files.text, "--seq-len", "64")
    monkeypatch.setattr(mixture_module, "BATCH_ELEMENTS", 10000)
    held, most, real = [0], [], BlockwiseModel.materialised

    @contextmanager
    def materialised(self, names, *, instead=None):
        own = {expert_of(name) for name in names} - {None}
        held[0] += len(own)
        most.append(held[0])
        with real(self, names, instead=instead):
            yield
        held[0] -= len(own)

    monkeypatch.setattr(BlockwiseModel, "materialised", materialised)
    few = qtool_json(*measure)
    assert 1 <= max(most) <= 2 and held == [0]
    monkeypatch.setattr(BlockwiseModel, "mixture", lambda self, index: None)
    whole = qtool_json(*measure)
    assert max(most) == 8
    assert few["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)
