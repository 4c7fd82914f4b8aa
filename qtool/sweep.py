"""What each layer loses at each width: measured once, kept in the work folder, and used for every target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.hessian import LayerStats
from calibration.windows import TokenWindows
from formats.errors import error_context
from qtool.checkpoint import find_tensor
from qtool.gptq import Factor, Solution, factorize, gptq_quantize, rtn_quantize
from qtool.journal import SWEEP, SWEEP_STATES, write_durably
from qtool.model import BlockwiseModel
from qtool.numerics import release_free_memory
from qtool.plan import TensorPlan, by_input, weight_of
from qtool.recipe import BITS, QuantSpec, Recipe
from qtool.states import HiddenStates, advance, calibrate

SAMPLE_ROWS = 256
"""Rows of a layer that are solved at each width; rows do not touch each other, so some speak for all."""
EMBEDDING_BITS = (3, 4, 5, 6, 7, 8)
EMBEDDING_ROWS = 4096


@dataclass(slots=True)
class Sweep:
    """What was measured."""

    # tensor -> key of a candidate -> relative error, share of outliers
    errors: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # linear -> the first one of those that read its input


def candidates(recipe: Recipe) -> dict[str, QuantSpec]:
    """The ways to store a layer of the blocks that a target chooses from, by key."""
    spec = recipe.linears
    widths = [bits for bits in BITS[spec.format] if bits <= 6 or spec.format == "int"]
    return {key_of(made): made for made in (replace(spec, bits=bits) for bits in widths)}


def embedding_candidates(recipe: Recipe) -> dict[str, QuantSpec]:
    """The same for embeddings and head, where the recipe leaves it to the target."""
    specs = [replace(recipe, embeddings=bits).embedding_spec for bits in EMBEDDING_BITS]
    return {key_of(spec): spec for spec in specs if spec is not None}


def key_of(spec: QuantSpec) -> str:
    return f"{spec.format}{spec.bits}g{spec.group_size}o{spec.outliers:g}t{spec.outlier_threshold:g}"


def load_sweep(folder: Path, identity: Mapping[str, Any], plan: Iterable[TensorPlan]) -> Sweep | None:
    """What an earlier run with the same model, text and method measured; None when there is none.

    It may have left tensors dense that `plan` does not: then it measured too little, and is none.
    """
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # what is torn is measured again
        kept = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        sweep = Sweep(**kept["sweep"])
        if kept["identity"] == identity and all(t.spec is None or t.name in sweep.errors for t in plan):
            return sweep
    return None


def sweep_identity(run: Mapping[str, Any], recipe: Recipe, windows: TokenWindows) -> dict[str, Any]:
    """What the measured losses depend on, from the run's identity: not the target, not what single layers are told."""
    values = {name: run[name] for name in ("versions", "weights", "config")}
    spec = {name: value for name, value in asdict(recipe.linears).items() if name != "bits"}
    return json.loads(json.dumps({**values, "linears": spec, "calibration": windows.sha256}))  # type: ignore[no-any-return]


def measure_sweep(
    model: BlockwiseModel,
    plan: Iterable[TensorPlan],
    recipe: Recipe,
    windows: TokenWindows,
    windows_per_batch: int,
    folder: Path,
    identity: Mapping[str, Any],
) -> Sweep:
    """One pass over the uncompressed model; kept in `folder` when it is done."""
    measured = _Sweep(model, {t.name: t for t in plan}, recipe)
    states = HiddenStates(folder, torch.from_numpy(windows.ids), windows_per_batch, SWEEP_STATES)
    sweep = measured.run(states)
    write_durably(folder / SWEEP, json.dumps({"identity": identity, "sweep": asdict(sweep)}, indent=1).encode())
    for name in SWEEP_STATES:
        (folder / name).unlink(missing_ok=True)
    return sweep


class _Sweep:
    def __init__(self, model: BlockwiseModel, plan: dict[str, TensorPlan], recipe: Recipe) -> None:
        self.model, self.plan = model, plan
        self.specs, self.embeddings = candidates(recipe), embedding_candidates(recipe)
        self.sweep = Sweep()

    def run(self, states: HiddenStates) -> Sweep:
        self._outside(states)
        for index in tqdm(range(len(self.model.blocks)), unit="block", desc="measure", disable=None):
            with self.model.block(index):
                self._block(index, states)
            release_free_memory()
        return self.sweep

    def _outside(self, states: HiddenStates) -> None:
        for tensor in self.plan.values():
            if not tensor.in_block and tensor.spec is not None:
                with self.model.materialised([tensor.name]):
                    weight = find_tensor(self.model.skeleton, tensor.name)
                    rows = weight[:: max(1, len(weight) // EMBEDDING_ROWS)]
                    self.sweep.errors[tensor.name] = _errors(self.embeddings, partial(rtn_quantize, rows))
        with self.model.materialised(self.model.outside_names(head=False)):
            states.write(0, map(self.model.embed, states.batches))

    def _block(self, index: int, states: HiddenStates) -> None:
        stats = calibrate(self.model, index, states)
        names = self.model.tensor_names(f"{self.model.block_name(index)}.")
        for readers, shared in by_input([self.plan[n] for n in names if self.plan[n].spec is not None], stats):
            self._layers(readers, shared)
        advance(self.model, index, states)

    def _layers(self, readers: list[TensorPlan], stats: LayerStats | None) -> None:
        weights = [weight_of(self.model, tensor) for tensor in readers]
        factor: Factor | None = None
        if stats is not None:
            factor = factorize(stats, weights, next(iter(self.specs.values())), readers[0].name)
        for tensor, weight in zip(readers, weights, strict=True):
            self.sweep.inputs[tensor.name] = readers[0].name
            rows = weight[:: max(1, len(weight) // SAMPLE_ROWS)]
            with error_context(tensor.name):
                self.sweep.errors[tensor.name] = _errors(self.specs, _solver(rows, stats, factor))


def _solver(rows: Tensor, stats: LayerStats | None, factor: Factor | None) -> Callable[[QuantSpec], Solution]:
    def solve(spec: QuantSpec) -> Solution:
        if factor is None or spec.method == "rtn":
            return rtn_quantize(rows, spec, stats)
        return gptq_quantize(rows, factor, spec)

    return solve


def _errors(specs: Mapping[str, QuantSpec], solve: Callable[[QuantSpec], Solution]) -> dict[str, tuple[float, float]]:
    solved = {key: solve(spec) for key, spec in specs.items()}
    return {key: (solution.relative_error, _outlier_share(solution)) for key, solution in solved.items()}


def _outlier_share(solution: Solution) -> float:
    """Of the layer's weights."""
    shape = solution.layer.shape
    return solution.layer.encoding.describe(shape).outliers / (shape[0] * shape[1])
