"""A run from a checkpoint to a file: decided, begun or gone on with, carried out, and written whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from calibration.windows import TokenWindows
from formats.writer import Writer
from qtool.budget import check_disk
from qtool.checkpoint import Checkpoint
from qtool.cluster import RayCluster
from qtool.errors import ConfigError
from qtool.job import draw_windows, meet_target, prepare
from qtool.journal import Journal
from qtool.memory import reset_peak
from qtool.numerics import exact_float32
from qtool.provenance import header_members, machine
from qtool.recipe import Recipe, RunOptions
from qtool.run import Run
from qtool.runlog import RunLog, RunReport
from qtool.solve import Here
from qtool.ternary import bits_warning, zeros_warning


def compress(
    checkpoint: Checkpoint,
    output: Path,
    recipe: Recipe,
    options: RunOptions | None = None,
    *,
    warn: Callable[[str], None] = lambda line: None,
) -> RunReport:
    """Write `output`, the compressed model. Nothing appears under that name unless the whole run succeeds.

    Whatever stops the run, the same call goes on behind the last finished block and writes the same bytes.
    `warn` is handed each line that the user should read, as soon as it is known.
    """
    options = options or RunOptions()
    started = time.perf_counter()
    _refuse_same_paths(output, options)
    reset_peak()
    with exact_float32(), ExitStack() as stack:
        log = stack.enter_context(RunLog(options.log_file))
        journal = stack.enter_context(Journal(output, options.work_dir))
        solver = stack.enter_context(RayCluster(options.cluster)) if options.cluster else Here()
        job = prepare(checkpoint, recipe, options, warn, solver.workers)
        if recipe.target is not None:
            if not options.restart:
                journal.refuse_other(job.identity(), 1 + len(job.model.blocks))
            if not journal.steps:
                _refuse_existing(output, options)
            job = meet_target(job, options, journal, warn)
        journal.begin(job.identity(), 1 + len(job.model.blocks), restart=options.restart)
        if not journal.is_published:
            _refuse_existing(output, options)
            if journal.steps:
                journal.check()
                warn(f"resumes after {journal.progress}, kept in {journal.folder}")
            check_disk(journal, job.plan, job.files, job.budget)
            windows = job.windows or draw_windows(job, journal, warn)
            _check_resumed(journal, windows, warn)
            job.budget.check_now("the calibration text")
            journal.start()
            with Writer(output, options.overwrite, part=journal.sections, written=journal.entries) as writer:
                Run(job, writer, journal, log, solver).blocks(windows)
                for name, data in job.files.items():
                    writer.add_file(name, data)
                quality = RunReport.whole(journal.reports).quality()
                writer.finish(**header_members(job.model, recipe, windows, job.sources, quality))
        report = RunReport.whole(journal.reports)
    entries = {entry.name: entry for entry in journal.entries}
    ternary = [(entries[name], share) for name, share in report.zeros.items()]
    for line in (zeros_warning(ternary), options.wanted_bits and bits_warning(ternary, options.wanted_bits)):
        if line:
            warn(line)
    report.seconds = time.perf_counter() - started
    return report


def _refuse_same_paths(output: Path, options: RunOptions) -> None:
    """One path for two things would destroy the one or the other at the very end."""
    for option, path in (("--work-dir", options.work_dir), ("--log-file", options.log_file)):
        if path is not None and path.resolve() == output.resolve():
            raise ConfigError(f"{option} {path}: is the output itself; give another")


def _refuse_existing(output: Path, options: RunOptions) -> None:
    if output.exists() and not options.overwrite:
        raise ConfigError(f"{output}: exists already; give another --output or --force")


def _check_resumed(journal: Journal, windows: TokenWindows | None, warn: Callable[[str], None]) -> None:
    """The windows have to be those that a resumed run was begun with."""
    if journal.steps:
        begun = journal.steps[0].report
        journal.check_same("calibration_sha256", windows and windows.sha256)
        if begun["machine"] != machine():
            warn(f"begun on {begun['machine']}, goes on with {machine()}: a few codes can differ from a run in one go")
