"""Blocks × stages: load, calibrate, quantize, pack, one block at a time. The only file that knows the order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
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
from qtool.checkpoint import find_tensor
from qtool.gptq import Solution
from qtool.job import Job
from qtool.journal import Journal
from qtool.mixture import visit_block
from qtool.numerics import release_free_memory
from qtool.pack import dense_section, rounded_section
from qtool.plan import TensorPlan, by_input, weight_of
from qtool.provenance import machine
from qtool.runlog import RunLog, RunReport
from qtool.solve import Solved, Solver, Work
from qtool.states import STATES_FILES, HiddenStates
from qtool.ternary import share_of_zeros


@dataclass(slots=True)
class _Begun:
    """A block whose layers are being solved."""

    writes: list[Callable[[], None]] = field(default_factory=list)  # what is still to be written of it
    experts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    checksum: int | None = None  # of the next block's inputs


class Run:
    """One pass over the model, from the first tensor to the last; what the journal has is left out."""

    def __init__(self, job: Job, writer: Writer, journal: Journal, log: RunLog, solver: Solver) -> None:
        self.solver, self.recipe = solver, job.recipe
        self.runs_ahead = job.recipe.independent and solver.is_elsewhere
        self.begun: deque[_Begun] = deque()
        self.model, self.budget = job.model, job.budget
        self.writer, self.journal, self.log = writer, journal, log
        self.plan = {tensor.name: tensor for tensor in job.plan}
        self.entries: list[TensorEntry] = []  # of the step being done
        self.report = RunReport()

    def blocks(self, windows: TokenWindows | None) -> None:
        """Write every tensor; with calibration windows, hand each block the quantized blocks' output."""
        states = None
        if windows is not None:
            ids = torch.from_numpy(windows.ids)
            names = STATES_FILES if self.recipe.independent else STATES_FILES[:2]
            states = HiddenStates(self.journal.folder, ids, self.budget.windows_per_batch, names)
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
                    self.begun.append(self._block(index, states, bar))
                release_free_memory()
                self._finish_all(but=1 if self.runs_ahead else 0)
                self.budget.check_now(f"block {index}")
                bar.update()
            self._finish_all()

    def _finish_all(self, but: int = 0) -> None:
        """Write what has been sent to be solved, block after block, and end their steps; the last ones may wait."""
        while len(self.begun) > but:
            step = self.begun.popleft()
            for write in step.writes:
                write()
            self.report.experts |= step.experts
            self._commit(step.checksum)

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

    def _block(self, index: int, states: HiddenStates | None, bar: tqdm[Any]) -> _Begun:
        """Calibrate, quantize and write one block; its outputs, which are the quantized ones unless blocks are
        independent, are the next block's inputs.
        """
        block = f"{self.model.block_name(index)}."

        def show(tensor: TensorPlan, solution: Solution) -> None:
            bar.set_postfix_str(f"{tensor.layer.removeprefix(block)} error {solution.relative_error:.2e}")

        step = _Begun()
        handle = partial(self._tensors, step=step, show=show)
        min_tokens = self.recipe.calibration.min_expert_tokens
        step.checksum, step.experts = visit_block(
            self.model, index, states, min_tokens, handle, self.budget.expert_batches
        )
        return step

    def _tensors(
        self,
        names: list[str],
        stats: dict[str, LayerStats],
        step: _Begun,
        show: Callable[[TensorPlan, Solution], None],
    ) -> None:
        """Solve and write tensors that are in memory; those that are quantized are left there decoded.

        Where the run goes ahead, they are sent to be solved, and written with the step. `stats` is emptied: statistics
        go as soon as they have been used.
        """
        release_free_memory()
        tensors = [self.plan[name] for name in names]
        dense = [tensor for tensor in tensors if tensor.spec is None]
        works = self._works(tensors, stats)
        if self.runs_ahead:
            step.writes.append(partial(self._write_solved, self.solver.start(works), show))
            step.writes += [partial(self._append, t, t.encoding, bytes(self._section(t))) for t in dense]
            return
        self._write_solved(self.solver.start(works), show)
        for tensor in dense:
            self._append(tensor, tensor.encoding, self._section(tensor))

    def _write_solved(self, results: Iterator[Solved], show: Callable[[TensorPlan, Solution], None]) -> None:
        for solved in results:
            tensor, decoded = self.plan[solved.name], solved.solution.decoded
            self._report(tensor, solved)
            if not self.recipe.independent:
                set_tensor(self.model.skeleton, tensor.name, decoded.T.contiguous() if tensor.transposed else decoded)
            self._write_solution(tensor, solved.solution)
            release_free_memory()
            show(tensor, solved.solution)

    def _works(self, tensors: list[TensorPlan], stats: dict[str, LayerStats]) -> Iterator[Work]:
        """What is to be solved: the experts, as many as are alike, and the others by what they read."""
        alike: dict[tuple[Any, ...], list[TensorPlan]] = {}
        others = []
        for tensor in tensors:
            if tensor.is_expert and tensor.layer in stats and tensor.spec and tensor.spec.method == "gptq":
                alike.setdefault((tensor.shape, tensor.spec), []).append(tensor)
            elif tensor.spec is not None:
                others.append(tensor)
        for experts in alike.values():
            step = -(-len(experts) // self.solver.workers)
            for start in range(0, len(experts), step):
                part = experts[start : start + step]
                yield self._work(part, [stats[tensor.layer] for tensor in part], alike=True)
        groups = by_input(others, stats)
        stats.clear()
        while groups:
            readers, shared = groups.pop(0)
            yield self._work(readers, [shared])

    def _work(self, tensors: list[TensorPlan], stats: Sequence[LayerStats | None], *, alike: bool = False) -> Work:
        return Work(
            names=[tensor.name for tensor in tensors],
            weights=[weight_of(self.model, tensor) for tensor in tensors],
            specs=[tensor.spec for tensor in tensors if tensor.spec is not None],
            stats=list(stats),
            alike=alike,
        )

    def _report(self, tensor: TensorPlan, solved: Solved) -> None:
        assert tensor.spec is not None
        solution, stats = solved.solution, solved.stats
        self.report.relative_errors[tensor.name] = solution.relative_error
        if isinstance(solution.layer, TernaryLinear):
            self.report.zeros[tensor.name] = share_of_zeros(solution.layer)
        if stats is None and tensor.spec.method != "rtn":
            self.report.uncalibrated.append(tensor.name)
        if stats is not None and tensor.spec.method == "gptq" and solved.percdamp is None:
            self.report.rounded.append(tensor.name)
        if stats is not None and stats.n_dropped:
            self.report.dropped_tokens[tensor.name] = stats.n_dropped
        if solved.percdamp is not None and solved.percdamp > tensor.spec.percdamp:
            self.report.harder_damped[tensor.name] = solved.percdamp
        self.log.layer(tensor, solved)

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
