"""`--target-size`, `--target-bits`, `--layer`, `--ignore`: which layer gets which bits."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace

import pytest
from invoke import qtool_json, refusal, run_qtool
from preparing import planned_bytes, prepared
from targeting import FAST, bits_of, dry_run, last_line

from formats.header import serialise_header
from formats.reader import QtmFile
from qtool.commands import _format_bits
from qtool.fit import planned_encoding
from qtool.options import build_recipe
from qtool.runlog import RunReport
from qtool.sizes import stored_bytes
from qtool.sweep import candidates, embedding_candidates

EMBEDDING = "model.embed_tokens.weight"


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


def test_the_predicted_loss_counts_what_the_user_chose(targeted):
    least = dry_run(targeted, "--target-bits", "6", "--embeddings", "16")["predicted_kl"]
    options = ("--embeddings", "2"), ("--layer", "v_proj=2", "--embeddings", "16")
    for chosen in options:
        assert dry_run(targeted, "--target-bits", "6", *chosen)["predicted_kl"] > 1.5 * least


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
