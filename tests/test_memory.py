"""`--max-memory`: kept to, or refused before anything is done."""

from __future__ import annotations

import json
import os
import re

import pytest
from invoke import python, qtool_json, refusal, run_qtool

import qtool.budget
from qtool.errors import ConfigError
from qtool.memory import parse_size, peak_rss_bytes, rss_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("800M", 800 * 10**6), ("64k", 64_000), ("1_", None), ("0", None),
     ("GB", None), ("-1GB", None), ("2 gb", 2 * 10**9), ("123", 123), ("1e9", None)],
)  # fmt: skip
def test_sizes_as_people_write_them(text, n_bytes):
    if n_bytes is not None:
        assert parse_size(text, "--max-memory") == n_bytes
        return
    with pytest.raises(ConfigError, match=rf"^--max-memory {text}: not a size; write it as 2GB, 1.5GiB or 800MB$"):
        parse_size(text, "--max-memory")


def test_resident_memory_now_and_at_most():
    assert 10_000_000 < rss_bytes() <= peak_rss_bytes()


def test_too_little_is_refused_with_the_least_that_is_needed(command, output):
    message = refusal(*command, "--max-memory", "100MB")
    found = re.fullmatch(
        r"--max-memory 100\.0 MB: this run needs at least ([0-9.]+) MB: one block and its statistics take that much",
        message,
    )
    assert found
    assert os.listdir(output.parent) == []
    assert qtool_json(*command, "--dry-run")["peak_rss_bytes"] <= float(found[1]) * 1e6 + 1e5
    assert refusal(*command, "--max-memory", "100MB", "--dry-run") == message


@pytest.mark.parametrize("options", [(), ("--target-bits", "5")], ids=["bits", "target"])
def test_the_least_that_is_named_is_enough(command, options):
    """In a process of its own, whose peak is the run's."""
    command += options
    least = qtool_json(*command, "--dry-run")["peak_rss_bytes"]
    done = python("-m", "qtool.cli", *command, "--max-memory", least, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss_bytes"] <= least


def test_a_run_that_takes_more_after_all_stops_and_keeps_what_it_has(command, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(qtool.budget, "peak_rss_bytes", lambda: 10**9 if stepped else 0)
        stepped = []
        commit = qtool.journal.Journal.commit
        patched.setattr(qtool.journal.Journal, "commit", lambda *args: (commit(*args), stepped.append(1)))
        message = refusal(*command, "--max-memory", "0.95GB")
    assert message == "--max-memory 950.0 MB: this run needs at least 1.1 GB: block 0 takes that much"
    result = run_qtool(*command)
    assert result.exit_code == 0 and "resumes after 1 of 3 blocks" in result.stderr


def test_a_text_that_takes_more_than_the_limit_is_refused_before_the_first_block(command, output, monkeypatch):
    monkeypatch.setattr(qtool.budget, "INTERPRETER_BYTES", 0)
    monkeypatch.setattr(qtool.budget, "TOKENIZER_BYTES", 0)
    message = refusal(*command, "--max-memory", "20MB")
    assert re.fullmatch(r"--max-memory 20\.0 MB: .* at least [0-9.]+ [MG]B: the calibration text .*", message)
    assert os.listdir(output.parent) == []


def test_less_memory_makes_smaller_batches(tiny_files, monkeypatch):
    from qtool.budget import plan_budget
    from qtool.checkpoint import open_checkpoint
    from qtool.model import BlockwiseModel
    from qtool.plan import plan_tensors
    from qtool.recipe import CalibrationSpec, QuantSpec, Recipe

    model = BlockwiseModel(open_checkpoint(str(tiny_files.model("llama"))))
    recipe = Recipe(linears=QuantSpec(group_size=16), calibration=CalibrationSpec(samples=64, seq_len=64))
    plan = plan_tensors(model, recipe)
    monkeypatch.setattr(qtool.budget, "INTERPRETER_BYTES", 0)
    monkeypatch.setattr(qtool.budget, "TOKENIZER_BYTES", 0)
    free = plan_budget(model, plan, recipe)
    tight = plan_budget(model, plan, recipe, free.peak_rss_bytes // 2)
    assert free.windows_per_batch == 16 > tight.windows_per_batch >= 1
    assert tight.peak_rss_bytes <= free.peak_rss_bytes // 2


def test_workers_have_no_more_experts_in_memory_than_the_limit_allows(tiny_files, monkeypatch):
    from qtool.budget import plan_budget
    from qtool.checkpoint import open_checkpoint
    from qtool.model import BlockwiseModel
    from qtool.plan import plan_tensors
    from qtool.recipe import CalibrationSpec, QuantSpec, Recipe

    model = BlockwiseModel(open_checkpoint(str(tiny_files.model("mixtral"))))
    recipe = Recipe(linears=QuantSpec(group_size=16), calibration=CalibrationSpec(samples=64, seq_len=64))
    plan = plan_tensors(model, recipe)
    alone = plan_budget(model, plan, recipe)
    many = plan_budget(model, plan, recipe, workers=8)
    batch = qtool.budget.SLACK * 4 * qtool.budget.EXPERT_COPIES * qtool.mixture.BATCH_ELEMENTS
    assert (alone.expert_batches, many.expert_batches) == (1, 8)
    assert many.peak_rss_bytes > alone.peak_rss_bytes + 7 * batch
    limit = alone.peak_rss_bytes + int(2 * batch)
    tight = plan_budget(model, plan, recipe, limit, workers=8)
    assert tight.expert_batches == 2 and tight.peak_rss_bytes <= limit
    assert tight.windows_per_batch == alone.windows_per_batch  # which would be another run


def test_smaller_batches_are_another_run(command, monkeypatch):
    """They round differently: a journal of the one is not gone on with by the other."""
    with monkeypatch.context() as patched:
        patched.setattr(qtool.run.Run, "_block", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "0 of 3 blocks are kept" in refusal(*command)
    monkeypatch.setattr(qtool.states, "TOKENS_PER_BATCH", 64)
    assert "holds another run (windows_per_batch (by --max-memory) is 1, was 16)" in refusal(*command)
