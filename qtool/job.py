"""What a run is to do, decided before the first tensor is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from calibration.windows import TokenWindows
from formats.strict_json import max_entries
from qtool.budget import Budget, check_disk_for_states, plan_budget
from qtool.checkpoint import Checkpoint
from qtool.errors import ConfigError
from qtool.journal import SPREAD_BITS, Journal
from qtool.model import BlockwiseModel
from qtool.numerics import release_free_memory
from qtool.plan import TensorPlan, plan_tensors
from qtool.provenance import embedded_files, header_bytes, run_identity, source_files
from qtool.recipe import Recipe, RunOptions
from qtool.sample import draw_sample
from qtool.seq2seq import blockwise_model
from qtool.sweep import find_sweep, key_of, measure_sweep, sweep_identity
from qtool.target import Spread, spread_bits, with_outliers


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, all of it decided before the first tensor is written."""

    model: BlockwiseModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    plan: list[TensorPlan]
    budget: Budget
    files: dict[str, bytes]
    read_sources: Callable[[], list[dict[str, Any]]]  # cached: all weights are read, so only when it is needed
    windows: TokenWindows | None = None  # where a target had to look at them already
    spread: Spread | None = None  # a target's bits

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Name, size and SHA-256 of the files that weights come from."""
        return self.read_sources()

    def identity(self) -> dict[str, Any]:
        return run_identity(self.model, self.recipe, self.sources, self.files, **self._settings())

    def _settings(self) -> dict[str, Any]:
        """What else decides the bytes: sums are rounded by the batch, and a target's bits are measured."""
        batch = {"windows_per_batch (by --max-memory)": self.budget.windows_per_batch}
        if self.recipe.target is None:
            return batch
        return batch | {SPREAD_BITS: {t.name: key_of(t.spec) for t in self.plan if t.spec is not None}}


def prepare(
    checkpoint: Checkpoint, recipe: Recipe, options: RunOptions, warn: Callable[[str], None], workers: int = 1
) -> Job:
    """Decide everything but what a target has to measure; `workers`: that solve at a time."""
    tokenizer = checkpoint.tokenizer()  # first: the cheapest thing that can be missing
    model = blockwise_model(checkpoint)
    if unused := checkpoint.unused():
        names = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        warn(f"{len(unused)} stored tensors are not part of the model that config.json describes: {names}")
    plan = plan_tensors(model, recipe)
    files = embedded_files(checkpoint, tokenizer)
    _check_sections(checkpoint.name, plan, len(files))
    return Job(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe,
        plan=plan,
        budget=plan_budget(model, plan, recipe, options.max_memory_bytes, workers),
        files=files,
        read_sources=cache(partial(source_files, checkpoint)),
    )


def _check_sections(name: str, plan: list[TensorPlan], n_files: int) -> None:
    """Refuse now what the writer would refuse at the end; ternary weights may take an eighth of what is planned."""
    n_bytes = sum(tensor.encoding.section_bytes(tensor.shape) for tensor in plan) // 8
    if len(plan) + n_files > max_entries(n_bytes):
        raise ConfigError(
            f"{name}: has {len(plan)} tensors, two or more for each expert; "
            f"a file of its size holds {max_entries(n_bytes)} (SPEC 4.1.1)"
        )


def meet_target(job: Job, options: RunOptions, journal: Journal, warn: Callable[[str], None]) -> Job:
    """The job with bits spread over the layers by what each costs, which is measured unless the folder has it."""
    windows = draw_windows(job, journal, warn)
    assert windows is not None
    job.budget.check_now("the calibration text")
    identity = sweep_identity(job.identity(), job.recipe, windows)
    if options.restart:
        journal.clear_measuring()
    sweep = None if options.restart else find_sweep(journal.folder, identity, job.plan, warn)
    if sweep is None:
        check_disk_for_states(journal, job.budget)
        with journal.giving_up():
            sweep = measure_sweep(job.model, job.plan, job.recipe, windows, job.budget, journal.folder, identity, warn)
    journal.clear_measuring()  # the states are large
    header = header_bytes(job.model, map(with_outliers, job.plan), job.recipe, windows, job.sources, job.files)
    other_bytes = header + sum(map(len, job.files.values()))
    spread = spread_bits(job.plan, sweep, job.recipe, other_bytes)
    plan = plan_tensors(job.model, job.recipe, spread.specs)
    return replace(job, plan=plan, windows=windows, spread=spread)


def draw_windows(job: Job, journal: Journal, warn: Callable[[str], None]) -> TokenWindows | None:
    """The calibration windows, if there is anything to calibrate."""
    if not job.recipe.n_windows:
        return None
    windows = draw_sample(job.model, job.recipe, job.tokenizer, keep_own=journal.sample_of(job.identity()))
    for line in (*windows.warnings, *windows.notes):
        warn(line)
    release_free_memory()  # the tokenizer's
    return windows
