"""The job of a compress command, as far as it is decided before the first tensor is written."""

from __future__ import annotations

from pathlib import Path

from qtool.checkpoint import open_checkpoint
from qtool.cli_compress import compress
from qtool.job import Job, draw_windows, meet_target, prepare
from qtool.journal import Journal
from qtool.numerics import exact_float32
from qtool.options import build_recipe
from qtool.provenance import header_bytes
from qtool.recipe import RunOptions
from qtool.sizes import stored_bytes
from qtool.target import with_outliers

RUN_OPTIONS = ("model", "output", "dry_run", "force", "max_memory", "work_dir", "restart", "log_file")
NOT_IN_A_RECIPE = (*RUN_OPTIONS, "trust_remote_code", "as_json")


def prepared(command: list[object], folder: Path) -> tuple[Job, int]:
    """The job of `compress ...`, and the bound for what its file holds besides tensors; `folder` is for its journal."""
    options = compress.make_context("compress", [str(argument) for argument in command[1:]]).params
    chosen = {name: value for name, value in options.items() if name not in NOT_IN_A_RECIPE}
    recipe = build_recipe(number_format=chosen.pop("format"), **chosen)
    with exact_float32(), Journal(folder / "prepared.qtm", options["work_dir"]) as journal:
        job = prepare(open_checkpoint(str(options["model"])), recipe, RunOptions(), print)
        if recipe.target is not None:
            job = meet_target(job, RunOptions(), journal, print)
        windows = job.windows or draw_windows(job, journal, print)
        header = header_bytes(job.model, map(with_outliers, job.plan), job.recipe, windows, job.sources, job.files)
        return job, header + sum(map(len, job.files.values()))


def planned_bytes(job: Job) -> int:
    """Of the sections of all tensors."""
    return sum(stored_bytes(tensor.encoding, tensor.shape) for tensor in job.plan)
