"""`--target-size`, `--target-bits`, `--layer`, `--ignore`: which layer gets which bits, and what is measured for it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain, repeat

import pytest
import torch
from correlated import make_layer
from interrupted import die_at, interrupt
from invoke import qtool_json, refusal, run_qtool
from preparing import planned_bytes, prepared

import qtool.budget
import qtool.job
import qtool.pipeline
import qtool.sample
import qtool.sweep
from formats.header import serialise_header
from formats.reader import QtmFile
from qtool.commands import _format_bits
from qtool.errors import QuantizeError
from qtool.fit import planned_encoding
from qtool.gptq import factorize
from qtool.layer_loss import sample_rows
from qtool.model import BlockwiseModel
from qtool.options import build_recipe
from qtool.recipe import CalibrationSpec, QuantSpec, Recipe
from qtool.runlog import RunReport
from qtool.sensitivity import Gradients
from qtool.sizes import stored_bytes
from qtool.states import HiddenStates
from qtool.sweep import candidates, embedding_candidates

FAST = ("--format", "int", "--effort", "fast")
EMBEDDING = "model.embed_tokens.weight"
MEASURED = "losses of each layer are taken from "


@pytest.fixture(scope="module")
def measured(tiny_files, tmp_path_factory):
    """What the options FAST measure on the llama, as a dry run leaves it."""
    folder = tmp_path_factory.mktemp("measured")
    command = ["compress", tiny_files.model("llama"), "-o", folder / "out.qtm", *tiny_files.compress_options(*FAST)]
    result = run_qtool(*command, "--target-size", "60kB", "--dry-run")
    assert result.exit_code == 0 and MEASURED not in result.stderr, result.output
    assert os.listdir(folder / "out.qtm.work") == ["sweep.json"]
    return folder / "out.qtm.work" / "sweep.json"


@pytest.fixture
def fresh(command):
    """A command to which a target can be added; nothing is measured for it yet."""
    return [*command, *FAST]


@pytest.fixture
def targeted(fresh, output, measured):
    """The same, with all measured that it asks for."""
    work = output.with_name(f"{output.name}.work")
    work.mkdir()
    shutil.copy(measured, work)
    return fresh


@pytest.fixture
def in_one_go(tiny_files, measured, tmp_path):
    """The bytes that a target gives when nothing stops its run."""

    def compress(*options):
        shutil.copytree(measured.parent, tmp_path / "work")
        output = tmp_path / "whole.qtm"
        base = ["compress", tiny_files.model("llama"), "-o", output, *tiny_files.compress_options(*FAST)]
        assert run_qtool(*base, *options, "--work-dir", tmp_path / "work").exit_code == 0
        return output.read_bytes()

    return compress


def forbid_measuring(monkeypatch):
    monkeypatch.setattr(qtool.job, "measure_sweep", lambda *args: pytest.fail("measured again"))


def count_measuring(monkeypatch):
    """A list that grows by one with every pass over the model."""
    passes, measure = [], qtool.job.measure_sweep
    monkeypatch.setattr(qtool.job, "measure_sweep", lambda *args: (passes.append(1), measure(*args))[1])
    return passes


def dry_run(command, *options):
    return qtool_json(*command, *options, "--dry-run")


def bits_of(estimate):
    return {row["name"]: row["bits"] for row in estimate["layers"]}


# ---- what a target promises


def upgrades(job):
    """(bytes more, tensor) of every wider candidate of every tensor that a target chose one for."""
    for tensor in job.plan:
        if tensor.spec is not None and not tensor.is_overridden:
            specs = (candidates if tensor.in_block else embedding_candidates)(job.recipe)
            for spec in specs.values():
                if spec.bits > tensor.spec.bits:
                    more = stored_bytes(planned_encoding(spec, tensor.shape), tensor.shape)
                    yield more - stored_bytes(tensor.encoding, tensor.shape), tensor


@pytest.mark.parametrize("size", [48_500, 55_000, 61_234, 70_000])
def test_a_size_is_kept_and_used(targeted, output, size):
    command = [*targeted, "--target-size", size]
    job, others = prepared([*command, "--work-dir", output.with_name(f"{output.name}.work")], output.parent)
    planned = planned_bytes(job) + others
    assert planned <= size
    assert min((more for more, _ in upgrades(job)), default=size) > size - planned  # not one more upgrade fits
    assert run_qtool(*command).exit_code == 0
    assert output.stat().st_size <= planned
    with QtmFile.open(output) as file:
        stored = {name: entry.encoding for name, entry in file.tensors.items()}
    assert stored == {tensor.name: tensor.encoding for tensor in job.plan}


def test_more_than_all_there_is_takes_the_widest_of_all(targeted):
    assert set(bits_of(dry_run(targeted, "--target-size", "1GB")).values()) == {8}


@pytest.mark.parametrize("bits", [4.6, 5.5, 7.25])
def test_bits_are_kept_and_used(targeted, output, bits):
    job, _ = prepared(
        [*targeted, "--target-bits", bits, "--work-dir", output.with_name(f"{output.name}.work")], output.parent
    )
    linears = [tensor for tensor in job.plan if tensor.is_block_linear]
    n_parameters = sum(tensor.n_parameters for tensor in linears)
    planned = sum(stored_bytes(tensor.encoding, tensor.shape) for tensor in linears)
    assert 8 * planned / n_parameters <= bits
    least = min(more for more, tensor in upgrades(job) if tensor.in_block)
    assert 8 * (planned + least) / n_parameters > bits
    assert run_qtool(*targeted, "--target-bits", bits).exit_code == 0
    assert qtool_json("inspect", output)["bits_per_weight"] == pytest.approx(8 * planned / n_parameters)


def test_a_larger_target_never_loses_more(targeted, tmp_path):
    errors = []
    for size in ("52kB", "58kB", "64kB"):
        found = qtool_json(*targeted, "--target-size", size, "-o", tmp_path / f"{size}.qtm")
        errors.append(found["quality"]["mean_relative_error"])
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize(("option", "asked"), [("--target-size", "30kB"), ("--target-bits", "2.5")])
def test_what_cannot_be_reached_names_the_least_that_can(targeted, option, asked):
    message = last_line(targeted, option, asked)
    least = re.fullmatch(rf"Error: {option} .*: this model takes at least ([0-9.]+)( kB)?", message)
    assert least, message
    assert dry_run(targeted, option, least[1] + (least[2] or "").strip())["layers"]


def last_line(command, *options):
    """What a run that says something beforehand ends with."""
    result = run_qtool(*command, *options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    return result.stderr.splitlines()[-1]


def test_layers_of_one_input_get_one_width(targeted):
    apart, fused = (bits_of(dry_run(targeted, "--target-bits", "5.5", *o)) for o in ((), ("--fused",)))

    def widths(bits, block):
        layers = {name.removeprefix(f"model.layers.{block}."): n for name, n in bits.items() if f".{block}." in name}
        return (
            {layers[f"self_attn.{kind}_proj.weight"] for kind in "qkv"},
            {layers[f"mlp.{kind}_proj.weight"] for kind in ("gate", "up")},
        )

    assert all(len(group) == 1 for block in range(3) for group in widths(fused, block))
    assert any(len(group) > 1 for block in range(3) for group in widths(apart, block))


# ---- exceptions


def test_a_layer_has_the_bits_that_it_is_given(command, output):
    options = ("--layer", "down_proj=6", "--layer", "layers[.]0[.]mlp=2", "--layer", "embed=3")
    assert run_qtool(*command, *FAST, *options).exit_code == 0
    for row in qtool_json("inspect", output)["tensors"]:
        if row["relative_error"] is not None or row["name"] == EMBEDDING:
            first = 6 if "down_proj" in row["name"] else 2 if "layers.0.mlp" in row["name"] else 4
            assert row["bits"] == (3 if row["name"] == EMBEDDING else first), row["name"]


def test_a_layer_that_is_ignored_stays_as_it_was(command, output):
    assert run_qtool(*command, *FAST, "--ignore", "o_proj", "--ignore", "layers[.]1[.].*up_proj").exit_code == 0
    estimate = dry_run(command, "--ignore", "o_proj", "--ignore", "layers[.]1[.].*up_proj")
    reasons = {row["name"]: row["reason"] for row in estimate["left_dense"]}
    dense = {row["name"] for row in qtool_json("inspect", output)["tensors"] if row["encoding"] == "dense"}
    assert set(reasons) == dense
    ignored = {name: reason for name, reason in reasons.items() if "proj" in name}
    assert ignored == {
        **{f"model.layers.{i}.self_attn.o_proj.weight": "left by --ignore o_proj" for i in range(3)},
        "model.layers.1.mlp.up_proj.weight": "left by --ignore layers[.]1[.].*up_proj",
    }


@pytest.mark.parametrize("target", [("--target-size", "62kB"), ("--target-bits", "7")])
@pytest.mark.parametrize("exception", [("--ignore", "v_proj"), ("--layer", "v_proj=8"), ("--layer", "v_proj=2")])
def test_exceptions_count_inside_the_budget(targeted, output, target, exception):
    assert run_qtool(*targeted, *target, *exception).exit_code == 0
    found = qtool_json("inspect", output)
    assert found["file_bytes"] <= 62_000 or target[0] != "--target-size"
    assert found["bits_per_weight"] <= 7 or target[0] != "--target-bits"
    kept = {(row["encoding"], row["bits"]) for row in found["tensors"] if "v_proj" in row["name"]}
    assert kept == {("dense", 32) if exception[0] == "--ignore" else ("uniform", int(exception[1][-1]))}


@pytest.mark.parametrize("exception", [("--layer", "v_proj=4"), ("--layer", "layers[.]0[.]=3")])
def test_outliers_by_a_threshold_count_inside_the_budget(command, output, exception):
    """A layer whose bits are the user's choice keeps what it was measured to keep."""
    options = ("--method", "spqr", "--outlier-threshold", "0.2", "--effort", "fast", "--target-bits", "8")
    run = run_qtool(*command, *options, *exception)
    assert run.exit_code == 0, run.output
    found = qtool_json("inspect", output)
    assert found["bits_per_weight"] <= 8
    assert sum(row["outliers"] for row in found["tensors"]) > 0


def test_a_size_is_kept_with_outliers(command, output):
    options = ("--method", "spqr", "--effort", "fast", "--target-size", "70kB", "--layer", "layers[.]0[.]=3")
    job, others = prepared([*command, *options, "--work-dir", f"{output}.work"], output.parent)
    assert any(tensor.encoding.describe(tensor.shape).outliers for tensor in job.plan)
    assert planned_bytes(job) + others <= 70_000
    assert run_qtool(*command, *options).exit_code == 0
    assert output.stat().st_size <= planned_bytes(job) + others


def test_candidates_are_widths_with_and_without_outliers_and_half_the_group():
    found = candidates(build("spqr", group_size=64)).values()
    assert {(spec.bits, spec.group_size, spec.outlier_threshold) for spec in found} == {
        (bits, group_size, threshold) for bits in range(2, 9) for group_size in (64, 32) for threshold in (0.2, 0.0)
    }
    assert {(spec.bits, spec.group_size) for spec in candidates(build("gptq")).values()} == {
        (bits, -1)
        for bits in range(1, 7)  # their outliers follow from the width
    }


def build(method, **options):
    return build_recipe(
        calibration="builtin", text_field="text", samples=4, seq_len=64, seed=0, embeddings=None, method=method,
        number_format="int" if method == "spqr" else None, effort="default", outliers=None, outlier_threshold=None,
        target_bits=4.0, **options,
    )  # fmt: skip


def test_a_rounded_file_under_a_target_is_verified_against_its_model(command, output, tiny_files):
    assert run_qtool(*command, "--method", "rtn", "--target-bits", "6").exit_code == 0
    source = ("--calibration", tiny_files.text)
    run = run_qtool("verify", output, "--against", tiny_files.model("llama"), *source)
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "no_such=4"), "--layer 'no_such': matches no layer; they are called as model.layers.2."),
        (("--ignore", "no_such"), "--ignore 'no_such': matches no layer; they are called as model.layers.2."),
        (("--ignore", "norm"), "--ignore 'norm': matches no layer; they are called as model.layers.2."),
        (("--ignore", "a("), "'a(': not a regular expression: missing ), unterminated subpattern"),
        (("--layer", "*=4"), "'*': not a regular expression: nothing to repeat"),
        (("--layer", "down_proj"), "--layer down_proj: must be REGEX=BITS, as 'down_proj=4'"),
        (("--layer", "=4"), "--layer =4: must be REGEX=BITS, as 'down_proj=4'"),
        (("--layer", "down_proj=four"), "--layer down_proj=four: must be REGEX=BITS, as 'down_proj=4'"),
        (("--layer", "down_proj=9"), "--layer down_proj=9: bits=9: must be 2 to 8"),
        (("--layer", "embed=4", "--embeddings", "16"), "--layer 'embed': model.embed_tokens.weight is left dense: "),
        (
            ("--method", "int8", "--group-size", "-1", "--layer", "up_proj=4"),
            "--method int8 has 8 bits in every layer: leave out",
        ),
        (
            ("--method", "int8", "--group-size", "-1", "--target-size", "1MB"),
            "--method int8 has 8 bits in every layer: leave out",
        ),
        (("--target-size", "1MB", "--target-bits", "4"), "target_size and target_bits: choose one of the two"),
        (("--target-size", "1MB", "--bits", "4"), "--bits 4: a target chooses the bits itself; give one of the two"),
        (("--target-size", "large"), "--target-size large: not a size; write it as 2GB, 1.5GiB or 800MB"),
        (("--target-bits", "0"), "target_bits=0: must be 1 to 8"),
        (("--target-bits", "nan"), "target_bits=nan: must be 1 to 8"),
        (("--embeddings", "0"), "embeddings=0: must be 2 to 8 bits, or 16 to leave them as they are"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(command, output, options, message):
    assert refusal(*command, *options).startswith(message)
    assert os.listdir(output.parent) == []


def test_embeddings_are_open_under_a_size_unless_they_are_given(targeted):
    free, given = (bits_of(dry_run(targeted, "--target-size", "50kB", *o)) for o in ((), ("--embeddings", "3")))
    assert free[EMBEDDING] > 3 and given[EMBEDDING] == 3
    assert bits_of(dry_run(targeted, "--target-bits", "5"))[EMBEDDING] == 8  # a size in bits counts the blocks alone


# ---- what is measured, and when


def test_a_dry_run_shows_the_plan(targeted, output):
    text = run_qtool(*targeted, "--target-size", "60kB", "--dry-run").stdout
    estimate = dry_run(targeted, "--target-size", "60kB")
    queries = [row for row in estimate["layers"] if "q_proj" in row["name"]]
    labels = Counter(f"{row['bits']} bits" for row in queries)
    shown = ", ".join(f"{label} ×{n}" for label, n in sorted(labels.items()))
    assert re.search(rf"model\.layers\.\*\.self_attn\.q_proj\.weight +{shown}$", text, re.MULTILINE)
    assert f"predicted loss   {estimate['predicted_kl']:.4g} nats of KL divergence a token, to second order\n" in text
    assert estimate["allocation_gap"] == 0 and "outliers" not in text
    assert estimate["file_bytes"] == pytest.approx(60_000, rel=0.1)
    assert not output.exists()


def test_a_plan_tells_groups_and_outliers_where_layers_differ():
    rows = [
        {"name": f"model.layers.{i}.up_proj.weight", "bits": 4, "group_size": group, "outliers": outliers}
        for i, (group, outliers) in enumerate([(64, False), (32, True), (64, False)])
    ]
    assert _format_bits(rows) == ["  model.layers.*.up_proj.weight  4 bits g32 and outliers ×1, 4 bits g64 ×2"]
    assert _format_bits(rows[::2]) == ["  model.layers.*.up_proj.weight  4 bits ×2"]


def test_the_loss_that_is_predicted_is_that_of_the_file(tiny_files, targeted, output):
    """To second order: at some bits it is about what `qtool eval` finds on the same text."""
    predicted = dry_run(targeted, "--target-bits", "4.5", "--embeddings", "16")["predicted_kl"]
    assert run_qtool(*targeted, "--target-bits", "4.5", "--embeddings", "16").exit_code == 0
    base = ("--baseline", tiny_files.model("llama"), "--data", tiny_files.text, "--seq-len", 64)
    found = qtool_json("eval", "kl", output, *base)
    assert 0.3 < found["kl_mean"] / predicted < 3


def test_the_run_after_a_dry_run_measures_nothing(monkeypatch, fresh, output):
    passes, command = count_measuring(monkeypatch), [*fresh, "--target-size", "60kB"]
    planned = dry_run(command)
    result = run_qtool(*command)
    assert result.exit_code == 0 and len(passes) == 1
    work = output.with_name(f"{output.name}.work")
    assert f"{MEASURED}{work}" in result.stderr.splitlines()
    rows = {row["name"]: row["bits"] for row in qtool_json("inspect", output)["tensors"]}
    assert bits_of(planned).items() <= rows.items()
    assert os.listdir(work) == ["sweep.json"]


def test_one_measurement_serves_every_target_of_a_work_folder(monkeypatch, targeted, output, measured):
    forbid_measuring(monkeypatch)
    work = ("--work-dir", measured.parent)
    options = [("--target-size", "50kB"), ("--target-bits", "6"), ("--target-bits", "5.5", "--fused")]
    options += [("--target-bits", "6", "--layer", "q_proj=3"), ("--target-size", "80kB", "--ignore", "up_proj")]
    assert len({json.dumps(dry_run(targeted, *o, *work)["layers"]) for o in options}) == len(options)


def other_text(tiny_files, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text(tiny_files.text.read_text()[::-1])
    return ("--calibration", text)


@pytest.mark.parametrize("changed", ["text", "model", "method", "samples", "restart"])
def test_what_was_measured_on_something_else_is_measured_again(monkeypatch, tiny_files, targeted, tmp_path, changed):
    options = {
        "text": other_text(tiny_files, tmp_path),
        "method": ("--sym",),
        "samples": ("--samples", "3"),
        "restart": ("--restart",),
    }.get(changed, ())
    if changed == "model":
        targeted[1] = tiny_files.model("mistral")
    passes = count_measuring(monkeypatch)
    dry_run(targeted, "--target-bits", "6", *options)
    assert len(passes) == 1


def test_what_was_left_out_is_measured_when_it_is_not(monkeypatch, fresh):
    passes = count_measuring(monkeypatch)
    dry_run(fresh, "--target-size", "80kB", "--ignore", "up_proj")
    assert sum("up_proj" in name for name in bits_of(dry_run(fresh, "--target-size", "80kB"))) == 3
    assert len(passes) == 2


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"identity": 3}', None])
def test_a_torn_measurement_is_made_again(monkeypatch, targeted, output, measured, torn):
    kept = output.with_name(f"{output.name}.work") / "sweep.json"
    kept.write_bytes(measured.read_bytes()[:-200] if torn is None else torn)
    passes = count_measuring(monkeypatch)
    dry_run(targeted, "--target-bits", "6")
    assert len(passes) == 1 and kept.read_bytes() == measured.read_bytes()


def test_text_that_the_model_wrote_is_its_own(monkeypatch, tiny_files, fresh):
    """It is kept from the dry run to the run, and no other model takes it for its own."""
    written, generate = [], qtool.sample._generate
    monkeypatch.setattr(
        qtool.sample, "_generate", lambda model, *args: (written.append(model), generate(model, *args))[1]
    )
    command = [*fresh, "--target-bits", "6", "--calibration", "self"]
    dry_run(command)
    dry_run(command)
    assert len(written) == 1
    dry_run([command[0], tiny_files.model("mistral"), *command[2:]])
    assert len(written) == 2
    assert run_qtool(*command).exit_code == 0 and len(written) == 2


def test_the_row_of_a_weight_far_from_all_others_is_measured():
    weight, stats = make_layer(1500, 32)
    weight[1013, 5] = 40.0
    for spec in (QuantSpec(), QuantSpec(input_scales=False)):
        kept = weight.clone()
        chosen, counts = sample_rows(weight, factorize(stats, [weight], spec, "layer"))
        assert len(chosen) <= 132 and counts.sum() == pytest.approx(1500)
        assert counts[chosen == 1013].tolist() == [1.0]  # it stands for itself alone
        assert torch.equal(weight, kept)


# ---- stopped at any moment


def stop_measuring(monkeypatch, stop):
    """Call `stop` when one block has been measured and the second is about to be."""
    advance = qtool.sweep.calibrate_and_advance

    def stopping(model, index, states):
        if index == 1:
            stop()
        return advance(model, index, states)

    monkeypatch.setattr(qtool.sweep, "calibrate_and_advance", stopping)


def in_a_child(run):
    """The exit status of a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_interrupted_while_it_measures_it_goes_on_behind_the_last_block(monkeypatch, fresh, output, in_one_go):
    def stop():
        raise KeyboardInterrupt

    command, work = [*fresh, "--target-size", "60kB"], output.with_name(f"{output.name}.work")
    with monkeypatch.context() as patched:
        stop_measuring(patched, stop)
        message = f"interrupted; what was measured is kept in {work}, the same command goes on from there"
        assert refusal(*command) == message
    with monkeypatch.context() as patched:
        measured, advance = [], qtool.sweep.calibrate_and_advance
        patched.setattr(qtool.sweep, "calibrate_and_advance", lambda m, i, s: (measured.append(i), advance(m, i, s))[1])
        assert run_qtool(*command).exit_code == 0
    assert measured == [1, 2]
    assert output.read_bytes() == in_one_go("--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


@pytest.mark.parametrize("damaged", [None, "sweep.1", "sweep.part.json", "gradient.3"])
def test_killed_while_it_measures_the_same_command_gives_the_same_bytes(monkeypatch, fresh, output, in_one_go, damaged):
    command, work = [*fresh, "--target-size", "60kB"], output.with_name(f"{output.name}.work")
    with monkeypatch.context() as patched:
        stop_measuring(patched, lambda: os._exit(9))
        assert in_a_child(lambda: run_qtool(*command)) == 9
    left = {"sweep.0", "sweep.1", "sweep.part.json", "gradient.2", "gradient.3"}
    assert set(os.listdir(work)) == left
    if damaged:
        with open(work / damaged, "r+b") as file:
            file.write(b"damaged.")
    result = run_qtool(*command)
    assert result.exit_code == 0, result.output
    goes_on = f"goes on measuring after 1 of 3 blocks, kept in {work}"
    assert (goes_on in result.stderr) == (damaged is None)
    assert output.read_bytes() == in_one_go("--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


@pytest.mark.parametrize("first", [1, 7])
def test_killed_before_any_act_of_measuring_the_same_command_gives_the_same_bytes(fresh, output, in_one_go, first):
    """Every thirteenth act from these on: each costs two passes over the model."""
    command, want = [*fresh, "--target-size", "60kB"], in_one_go("--target-size", "60kB")
    n, work = first, output.with_name(f"{output.name}.work")
    while not (work / "sweep.json").exists():  # not killed before all was measured
        assert die_at(n, command)
        if (work / "sweep.json").exists():
            break
        assert not output.exists()
        result = run_qtool(*command)
        assert result.exit_code == 0, (n, result.output)
        assert output.read_bytes() == want, n
        assert os.listdir(work) == ["sweep.json"]
        output.unlink()
        (work / "sweep.json").unlink()
        work.rmdir()
        n += 13
    assert n > 40  # the acts were really counted


@pytest.mark.parametrize(("first", "second"), [(("--ignore", "up_proj"), ()), ((), ("--restart",))])
def test_a_part_of_a_measurement_that_does_not_fit_is_made_again(monkeypatch, fresh, output, first, second):
    command = [*fresh, "--target-size", "80kB"]
    with monkeypatch.context() as patched:
        stop_measuring(patched, lambda: os._exit(9))
        assert in_a_child(lambda: run_qtool(*command, *first)) == 9
    result = run_qtool(*command, *second)
    assert result.exit_code == 0, result.output
    assert "goes on" not in result.stderr
    assert os.listdir(output.with_name(f"{output.name}.work")) == ["sweep.json"]


def test_what_was_measured_to_the_end_outlives_what_lies_beside_it(monkeypatch, targeted, output, measured):
    work = output.with_name(f"{output.name}.work")
    for name in ("sweep.0", "sweep.1", "sweep.part.json"):
        (work / name).write_bytes(b"of a run that was killed")
    forbid_measuring(monkeypatch)
    dry_run(targeted, "--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


def test_measurements_that_cannot_be_read_are_none(fresh, output):
    (output.parent / "a.work" / "sweep.json").mkdir(parents=True)
    assert run_qtool(*fresh, "--target-size", "60kB").exit_code == 0


def test_what_cannot_be_measured_leaves_nothing(monkeypatch, fresh, output):
    def stop():
        raise QuantizeError("a layer that cannot be solved")

    stop_measuring(monkeypatch, stop)
    assert refusal(*fresh, "--target-size", "60kB") == "a layer that cannot be solved"
    assert os.listdir(output.parent) == []


def test_too_little_space_for_measuring_is_said_before_it(monkeypatch, fresh, output):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(qtool.budget.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    forbid_measuring(monkeypatch)
    message = refusal(*fresh, "--target-size", "60kB")
    assert message.startswith(f"{output}.work: the run needs ") and "1.0 kB are free; make room" in message
    assert os.listdir(output.parent) == []


def test_memory_is_watched_while_it_measures(monkeypatch, fresh, output):
    stop_measuring(monkeypatch, lambda: None)
    taken = chain([0], repeat(10**12))  # after the text, and after the first block
    monkeypatch.setattr(qtool.budget, "peak_rss_bytes", lambda: next(taken))
    message = refusal(*fresh, "--target-size", "60kB", "--max-memory", "10GB")
    assert message.startswith("--max-memory 10.0 GB: this run needs at least 1.1 TB: block 0 takes that much")
    assert "sweep.part.json" in os.listdir(output.with_name(f"{output.name}.work"))  # the same command goes on from it


def interrupt_in(monkeypatch, name):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Gradients, name, stop)


def test_interrupted_before_a_block_is_measured_it_leaves_nothing(monkeypatch, fresh, output):
    """What gradients take on disk is large, and nothing could go on with it."""
    with monkeypatch.context() as patched:
        interrupt_in(patched, "_at_logits")
        assert refusal(*fresh, "--target-size", "60kB") == "interrupted; nothing was left behind"
    assert os.listdir(output.parent) == []


def test_a_model_without_gradients_leaves_nothing(monkeypatch, fresh, output):
    run = BlockwiseModel.run
    monkeypatch.setattr(BlockwiseModel, "run", lambda self, index, x: run(self, index, x).detach())
    message = refusal(*fresh, "--target-size", "60kB")
    assert message.startswith("model.layers.2: its gradients cannot be computed") and message.endswith("; give --bits")
    assert os.listdir(output.parent) == []


def test_a_file_of_the_users_own_is_not_taken_for_a_gradient(fresh, output):
    work = output.with_name(f"{output.name}.work")
    work.mkdir()
    (work / "gradient.py").touch()
    assert "has 'gradient.py' in it, which is no run's" in refusal(*fresh, "--target-size", "60kB")
    assert os.listdir(work) == ["gradient.py"]


def test_disk_is_never_more_than_is_said(monkeypatch, fresh, output):
    sizes, path_of, said = [], HiddenStates._path, []
    work = output.with_name(f"{output.name}.work")

    def counting(states, step):
        sizes.append(sum(path.stat().st_size for path in work.iterdir() if path.name[-1].isdigit()))
        return path_of(states, step)

    check = qtool.job.check_disk_for_states
    monkeypatch.setattr(qtool.job, "check_disk_for_states", lambda *a: (said.append(a[1].measuring_bytes), check(*a)))
    monkeypatch.setattr(HiddenStates, "_path", counting)
    dry_run(fresh, "--target-size", "60kB")
    assert 0.8 * said[0] <= max(sizes) <= said[0]


def test_windows_of_all_sources_are_run_backward():
    recipe = Recipe(calibration=CalibrationSpec(source="code.txt,prose.txt,self"))
    assert qtool.sweep._mixed(torch.arange(7).numpy(), recipe).tolist() == [0, 3, 5, 1, 4, 6, 2]
    assert qtool.sweep._mixed(torch.arange(7).numpy(), Recipe()).tolist() == list(range(7))


def test_the_predicted_loss_counts_what_the_user_chose(targeted):
    least = dry_run(targeted, "--target-bits", "6", "--embeddings", "16")["predicted_kl"]
    options = ("--embeddings", "2"), ("--layer", "v_proj=2", "--embeddings", "16")
    for chosen in options:
        assert dry_run(targeted, "--target-bits", "6", *chosen)["predicted_kl"] > 1.5 * least


def test_a_second_target_takes_what_a_run_beside_it_measured(fresh, output, tmp_path):
    assert run_qtool(*fresh, "--target-size", "60kB").exit_code == 0
    second = run_qtool(*fresh, "-o", output.with_name("second.qtm"), "--target-size", "55kB")
    assert second.exit_code == 0
    assert f"losses of each layer are taken from {output}.work" in second.stderr
    assert os.listdir(output.with_name("second.qtm.work")) == ["sweep.json"]


def test_what_a_killed_measurement_left_goes_with_any_run(monkeypatch, fresh, output):
    with monkeypatch.context() as patched:
        stop_measuring(patched, lambda: os._exit(9))
        assert in_a_child(lambda: run_qtool(*fresh, "--target-size", "60kB")) == 9
    assert run_qtool(*fresh, "--bits", "4").exit_code == 0
    assert os.listdir(output.parent) == [output.name]


def test_a_run_that_is_stopped_goes_on_with_the_same_bits(monkeypatch, fresh, output, in_one_go):
    command, work = [*fresh, "--target-size", "60kB"], output.with_name(f"{output.name}.work")
    assert "1 of 3 blocks are kept in" in interrupt(monkeypatch, command)
    forbid_measuring(monkeypatch)
    result = run_qtool(*command)
    assert result.exit_code == 0 and f"resumes after 1 of 3 blocks, kept in {work}" in result.stderr
    assert output.read_bytes() == in_one_go("--target-size", "60kB")
    assert os.listdir(work) == ["sweep.json"]


def test_another_target_does_not_mix_but_can_be_planned(monkeypatch, fresh):
    interrupt(monkeypatch, [*fresh, "--target-size", "60kB"])
    assert dry_run(fresh, "--target-size", "61kB")["layers"]
    monkeypatch.setattr(qtool.pipeline, "meet_target", lambda *args: pytest.fail("measured for nothing"))
    assert "holds another run (" in last_line(fresh, "--target-size", "61kB")


def test_an_output_that_exists_is_refused_before_anything_is_measured(monkeypatch, tiny_files, targeted, output):
    command = [*targeted, "--target-size", "60kB"]
    assert run_qtool(*command).exit_code == 0
    forbid_measuring(monkeypatch)
    message = refusal(*command, *other_text(tiny_files, output.parent))
    assert message == f"{output}: exists already; give another --output or --force"


# ---- the bound that a size is held against


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "rtn"),
        ("--format", "nf4", "--double-quant"),
        ("--format", "fitted", "--bits", "3", "--effort", "fast"),
        ("--stat-bits", "3"),
        ("--embeddings", "16", "--layer", "up_proj=3", "--ignore", "o_proj"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_header_is_never_larger_than_its_bound(tiny_files, tmp_path, family, options):
    if family == "gpt2":
        options = tuple({"up_proj=3": "c_fc=3", "o_proj": "c_attn"}.get(option, option) for option in options)
    path = tiny_files.compressed(family, *options)
    command = ["compress", tiny_files.model(family), *tiny_files.compress_options(*options)]
    job, bound = prepared(command, tmp_path)
    with QtmFile.open(path) as file:
        sections = sum(stored_bytes(entry.encoding, entry.shape) for entry in file.tensors.values())
        assert sections == planned_bytes(job)
        assert bound - 10_000 < file.n_bytes - sections <= bound


def test_a_header_full_of_trouble_is_not_larger_than_its_bound(tiny_files, tmp_path):
    _, bound = prepared(["compress", tiny_files.model("llama"), *tiny_files.compress_options()], tmp_path)
    with QtmFile.open(tiny_files.compressed("llama")) as file:
        names = [entry.name for entry in file.tensors.values() if entry.relative_error is not None]
        report = RunReport(
            relative_errors=dict.fromkeys(names, 1 / 3),
            harder_damped=dict.fromkeys(names, 0.1 + 0.2),
            dropped_tokens=dict.fromkeys(names, 123_456_789),
        )
        troubled = replace(file.header, quality=report.quality())
        longer = len(serialise_header(troubled)) - len(serialise_header(file.header))
        sections = sum(stored_bytes(entry.encoding, entry.shape) for entry in file.tensors.values())
        assert longer > 100 * len(names) // 2
        assert file.n_bytes - sections + longer <= bound
