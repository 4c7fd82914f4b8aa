"""Compress runs under a target, and how often they measure."""

from __future__ import annotations

import pytest
from invoke import qtool_json, run_qtool

import qtool.job

FAST = ("--format", "int", "--effort", "fast")
MEASURED = "losses of each layer are taken from "


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


def last_line(command, *options):
    """What a run that says something beforehand ends with."""
    result = run_qtool(*command, *options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    return result.stderr.splitlines()[-1]
