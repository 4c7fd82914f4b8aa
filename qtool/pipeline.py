"""Blocks × stages: load, calibrate, quantize, pack, one block at a time. The only file that knows the order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.hessian import LayerStats
from calibration.windows import TokenWindows
from formats.encoding import Encoding, encoding_of
from formats.errors import error_context
from formats.header import TensorEntry
from formats.layer import TernaryLinear
from formats.section import pack
from formats.skeleton import set_tensor
from formats.writer import BytesLike, Writer
from qtool.budget import check_disk
from qtool.checkpoint import Checkpoint, find_tensor
from qtool.errors import ConfigError
from qtool.gptq import Factor, Solution, factorize, gptq_quantize, rtn_quantize
from qtool.gptq_batch import gptq_quantize_all
from qtool.int8 import int8_quantize
from qtool.job import Job, draw_windows, meet_target, prepare
from qtool.journal import Journal
from qtool.memory import reset_peak
from qtool.mixture import Mixture, RoutedTokens
from qtool.numerics import exact_float32, release_free_memory
from qtool.pack import dense_section, rounded_section
from qtool.plan import TensorPlan, by_input, weight_of
from qtool.provenance import header_members, machine
from qtool.recipe import Recipe, RunOptions
from qtool.runlog import RunLog, RunReport
from qtool.states import HiddenStates, advance, calibrate
from qtool.ternary import share_of_zeros, zeros_warning


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
    with exact_float32(), RunLog(options.log_file) as log, Journal(output, options.work_dir) as journal:
        job = prepare(checkpoint, recipe, options, warn)
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
                _Run(job, writer, journal, log).blocks(windows)
                for name, data in job.files.items():
                    writer.add_file(name, data)
                quality = RunReport.whole(journal.reports).quality()
                writer.finish(**header_members(job.model, recipe, windows, job.sources, quality))
        report = RunReport.whole(journal.reports)
    entries = {entry.name: entry for entry in journal.entries}
    if line := zeros_warning([(entries[name], share) for name, share in report.zeros.items()]):
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


class _Run:
    """One pass over the model, from the first tensor to the last; what the journal has is left out."""

    def __init__(self, job: Job, writer: Writer, journal: Journal, log: RunLog) -> None:
        self.model, self.budget = job.model, job.budget
        self.min_expert_tokens = job.recipe.calibration.min_expert_tokens
        self.writer, self.journal, self.log = writer, journal, log
        self.plan = {tensor.name: tensor for tensor in job.plan}
        self.entries: list[TensorEntry] = []  # of the step being done
        self.report = RunReport()

    def blocks(self, windows: TokenWindows | None) -> None:
        """Write every tensor; with calibration windows, hand each block the quantized blocks' output."""
        states = None
        if windows is not None:
            ids = torch.from_numpy(windows.ids)
            states = HiddenStates(self.journal.folder, ids, self.budget.windows_per_batch)
        with self.journal.giving_up():
            if self.journal.steps:
                self._resume(states)
            else:
                checksum = self._outside(states)
                self._commit(checksum, calibration_sha256=windows and windows.sha256, machine=machine())
            self._blocks(states)

    def _resume(self, states: HiddenStates | None) -> None:
        """Make ready for the next block, if one is left: what it reads is there, and how blocks are called is known."""
        done = len(self.journal.steps) - 1
        if states is None or done == len(self.model.blocks):
            return
        states.check(done, self.journal.steps[-1].report["states"])
        looked_up = self.model.outside_names(head=False)
        decoded = {}
        for name in looked_up:
            if self.plan[name].spec is not None:
                with self.model.materialised([name]):
                    self._section(self.plan[name])
                    decoded[name] = find_tensor(self.model.skeleton, name)
        with self.model.materialised(looked_up, instead=decoded):
            self.model.learn_calls(states.batches)

    def _blocks(self, states: HiddenStates | None) -> None:
        count, done = len(self.model.blocks), len(self.journal.steps) - 1
        with tqdm(total=count, initial=done, unit="block", desc="quantize", disable=None) as bar:
            for index in range(done, count):
                bar.set_description(f"quantize block {index + 1} of {count}")
                with self.model.block(index, experts=False):
                    self._commit(self._block(index, states, bar))
                release_free_memory()
                self.budget.check_now(f"block {index}")
                bar.update()

    def _commit(self, checksum: int | None, **first: Any) -> None:
        """End a step: from here on, no interruption costs it."""
        self.writer.sync()
        self.journal.commit(self.entries, asdict(self.report) | {"states": checksum} | first)
        self.entries, self.report = [], RunReport()

    def _outside(self, states: HiddenStates | None) -> int | None:
        """Write what lies outside the blocks, one tensor in memory at a time, and the first block's inputs, whose
        checksum is returned.
        """
        looked_up = self.model.outside_names(head=False) if states is not None else []
        decoded: dict[str, Tensor] = {}
        for name in sorted(self.model.outside_names(), key=lambda name: name in looked_up):
            with self.model.materialised([name]):
                self._append(self.plan[name], self.plan[name].encoding, self._section(self.plan[name]))
                if name in looked_up and self.plan[name].spec is not None:
                    # Blocks are calibrated on what will be looked up: the values are now the decoded ones.
                    decoded[name] = find_tensor(self.model.skeleton, name)
            release_free_memory()
        if states is None:
            return None
        with self.model.materialised(looked_up, instead=decoded):
            return states.write(0, map(self.model.embed, states.batches))

    def _block(self, index: int, states: HiddenStates | None, bar: tqdm[Any]) -> int | None:
        """Calibrate, quantize and write one block; its quantized outputs are the next block's inputs, whose checksum
        is returned.
        """
        block = f"{self.model.block_name(index)}."

        def show(tensor: TensorPlan, solution: Solution) -> None:
            bar.set_postfix_str(f"{tensor.layer.removeprefix(block)} error {solution.relative_error:.2e}")

        stats = calibrate(self.model, index, states)
        release_free_memory()
        self._tensors(self.model.own_names(index), stats, show)
        name = self.model.mixture(index)
        if name is None:
            return advance(self.model, index, states)
        mixture, handle = Mixture(self.model, index, name), partial(self._tensors, show=show)
        if states is None:
            mixture.visit(handle)
            return None
        tokens = RoutedTokens(mixture, states)
        few = tokens.visit(self.min_expert_tokens, handle)
        self.report.experts[name] = {"tokens": tokens.counts, "pooled": few}
        with tokens.replayed():
            return advance(self.model, index, states)

    def _tensors(
        self, names: list[str], stats: Mapping[str, LayerStats], show: Callable[[TensorPlan, Solution], None]
    ) -> None:
        """Solve and write tensors that are in memory; those that are quantized are left there decoded."""
        tensors = [self.plan[name] for name in names]
        together = [t for t in tensors if t.is_expert and t.layer in stats and t.spec and t.spec.method == "gptq"]
        groups = by_input([t for t in tensors if t.spec is not None and t not in together], stats)
        for solved in (self._solve_experts(together, stats), self._solve_groups(groups)):
            for tensor, solution in solved:
                self._write_solution(tensor, solution)
                release_free_memory()
                show(tensor, solution)
        for tensor in tensors:
            if tensor.spec is None:
                self._append(tensor, tensor.encoding, self._section(tensor))

    def _solve_groups(
        self, groups: list[tuple[list[TensorPlan], LayerStats | None]]
    ) -> Iterator[tuple[TensorPlan, Solution]]:
        """Quantize linears, those that read one input after each other."""
        while groups:
            readers, shared = groups.pop(0)  # statistics go as soon as they have been used
            yield from self._solve(readers, shared)

    def _solve_experts(
        self, experts: list[TensorPlan], stats: Mapping[str, LayerStats]
    ) -> Iterator[tuple[TensorPlan, Solution]]:
        """Quantize the linears of experts, each with its own input, as many as are alike at a time."""
        alike: dict[tuple[Any, ...], list[TensorPlan]] = {}
        for tensor in experts:
            alike.setdefault((tensor.shape, tensor.spec), []).append(tensor)
        for (_, spec), tensors in alike.items():
            self.log.start_layer()
            weights = [weight_of(self.model, tensor) for tensor in tensors]
            own = [stats[tensor.layer] for tensor in tensors]
            solutions = gptq_quantize_all(weights, own, spec, [tensor.name for tensor in tensors])
            for tensor, shared, (solution, factor) in zip(tensors, own, solutions, strict=True):
                self._report(tensor, solution, shared, factor)
                set_tensor(self.model.skeleton, tensor.name, solution.decoded)
                yield tensor, solution

    def _solve(self, readers: list[TensorPlan], stats: LayerStats | None) -> Iterator[tuple[TensorPlan, Solution]]:
        """Quantize the linears that read one input, and put their decoded weights in the model."""
        self.log.start_layer()
        weights = [weight_of(self.model, tensor) for tensor in readers]
        factor: Factor | None = None
        for tensor in readers:
            assert tensor.spec is not None
            weight = weights.pop(0)
            with error_context(tensor.name):
                if tensor.spec.method == "rtn" or stats is None:
                    solution = rtn_quantize(weight, tensor.spec, stats)
                elif tensor.spec.method == "int8":
                    solution = int8_quantize(weight, stats, tensor.spec)
                else:
                    factor = factor or factorize(stats, [weight, *weights], tensor.spec, tensor.name)
                    solution = gptq_quantize(weight, factor, tensor.spec)
            self._report(tensor, solution, stats, factor)
            decoded = solution.decoded.T.contiguous() if tensor.transposed else solution.decoded
            set_tensor(self.model.skeleton, tensor.name, decoded)
            yield tensor, solution

    def _report(self, tensor: TensorPlan, solution: Solution, stats: LayerStats | None, factor: Factor | None) -> None:
        assert tensor.spec is not None
        self.report.relative_errors[tensor.name] = solution.relative_error
        if isinstance(solution.layer, TernaryLinear):
            self.report.zeros[tensor.name] = share_of_zeros(solution.layer)
        if stats is None and tensor.spec.method != "rtn":
            self.report.uncalibrated.append(tensor.name)
        if stats is not None and stats.n_dropped:
            self.report.dropped_tokens[tensor.name] = stats.n_dropped
        if factor is not None and factor.percdamp > tensor.spec.percdamp:
            self.report.harder_damped[tensor.name] = factor.percdamp
        self.log.layer(tensor, solution, stats, factor)

    def _section(self, tensor: TensorPlan) -> BytesLike:
        """STAGE 5, pack: a tensor that no solver touches; one that is rounded is left in memory as decoded."""
        values = find_tensor(self.model.skeleton, tensor.name)
        with error_context(tensor.name):
            return dense_section(values, tensor) if tensor.spec is None else rounded_section(values, tensor)

    def _write_solution(self, tensor: TensorPlan, solution: Solution) -> None:
        """STAGE 5, pack: append a layer that was solved."""
        encoding, error = encoding_of(solution.layer), solution.relative_error
        self._append(tensor, encoding, pack(solution.layer), relative_error=error, transposed=tensor.transposed)

    def _append(self, tensor: TensorPlan, encoding: Encoding, section: BytesLike, **fields: Any) -> None:
        self.entries.append(self.writer.add_tensor(tensor.name, tensor.shape, encoding, section, **fields))
