"""What each layer loses at each width: measured once, kept in the work folder, and used for every target."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.hessian import LayerStats
from calibration.windows import TokenWindows
from formats.errors import error_context
from qtool.budget import Budget
from qtool.checkpoint import find_tensor
from qtool.errors import ConfigError
from qtool.gptq import (
    Factor,
    Solution,
    factorize,
    gptq_quantize,
    outlier_unit,
    output_energy,
    relative_error,
    rtn_quantize,
)
from qtool.journal import SWEEP, SWEEP_PART, SWEEP_STATES, write_durably
from qtool.model import BlockwiseModel
from qtool.numerics import release_free_memory
from qtool.plan import TensorPlan, by_input, weight_of
from qtool.recipe import BITS, QuantSpec, Recipe
from qtool.states import HiddenStates, calibrate_and_advance

SAMPLE_ROWS, HOT_ROWS = 96, 32
"""Rows of a layer that are solved at each width; rows do not touch each other, so some speak for all. But one weight
far from all others can cost more than the rest of its layer: the rows of the largest are always among them."""
MEMORY = 6
"""Of a trellis while it is measured: a longer one lowers the error of every layer by much the same share."""
LEAST_HALVED = 64
"""Groups this long are also measured at half the length."""
EMBEDDING_BITS = (3, 4, 5, 6, 7, 8)
EMBEDDING_ROWS = 4096
TORN = (OSError, ValueError, KeyError, TypeError)
"""What reading a broken file, or one that is not there, raises: it is measured again."""
REVISION = 1
"""Of how losses are measured: to be raised when that changes."""


@dataclass(slots=True)
class Sweep:
    """What was measured."""

    # tensor -> key of a candidate -> relative error, share of outliers
    errors: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # linear -> the first one of those that read its input


def candidates(recipe: Recipe) -> dict[str, QuantSpec]:
    """The ways to store a layer of the blocks that a target chooses from, by key."""
    spec = recipe.linears
    variants = [spec]
    if spec.format != "trellis" and spec.group_size >= LEAST_HALVED:  # a path's levels fit each other, not each group
        variants.append(replace(spec, group_size=spec.group_size // 2))
    if spec.keeps_outliers and not spec.outliers_pay:  # their price says how many each width is to keep
        variants += [replace(v, outliers=0.0, outlier_threshold=0.0, outliers_pay=False) for v in variants]
    return {key_of(made): made for v in variants for made in (replace(v, bits=bits) for bits in BITS[spec.format])}


def embedding_candidates(recipe: Recipe) -> dict[str, QuantSpec]:
    """The same for embeddings and head, where the recipe leaves it to the target."""
    specs = [replace(recipe, embeddings=bits).embedding_spec for bits in EMBEDDING_BITS]
    return {key_of(spec): spec for spec in specs if spec is not None}


def key_of(spec: QuantSpec) -> str:
    return f"{spec.format}{spec.bits}g{spec.group_size}o{spec.outliers:g}t{spec.threshold:g}"


def find_sweep(
    folder: Path, identity: Mapping[str, Any], plan: Iterable[TensorPlan], warn: Callable[[str], None]
) -> Sweep | None:
    """What an earlier run measured, in its work folder or in one beside it: the default one has the target's name.

    It is kept in `folder`, since a run goes on with the losses that it began with.
    """
    names = {tensor.name for tensor in plan if tensor.spec is not None}
    for path in dict.fromkeys((folder / SWEEP, *sorted(folder.parent.glob(f"*/{SWEEP}")))):
        if (sweep := _read_sweep(path, identity)) is not None and names <= sweep.errors.keys():
            warn(f"losses of each layer are taken from {path.parent}")
            if path.parent != folder:
                _keep(folder / SWEEP, identity=identity, sweep=asdict(sweep))
            return sweep
    return None


def _read_sweep(path: Path, identity: Mapping[str, Any]) -> Sweep | None:
    """What a file holds, if it is whole and of this identity."""
    with suppress(*TORN):
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Sweep(**kept["sweep"]) if kept["identity"] == identity else None
    return None


def sweep_identity(run: Mapping[str, Any], recipe: Recipe, windows: TokenWindows) -> dict[str, Any]:
    """What the measured losses depend on, from the run's identity: not the target, not what single layers are told."""
    values = {name: run[name] for name in ("versions", "weights", "config")}
    spec = {name: value for name, value in asdict(recipe.linears).items() if name != "bits"}
    keys = [*candidates(recipe), *embedding_candidates(replace(recipe, embeddings=8))]
    measured = {"linears": spec, "candidates": keys, "revision": REVISION, "calibration": windows.sha256}
    return json.loads(json.dumps(values | measured))  # type: ignore[no-any-return]


def measure_sweep(
    model: BlockwiseModel,
    plan: Iterable[TensorPlan],
    recipe: Recipe,
    windows: TokenWindows,
    budget: Budget,
    folder: Path,
    identity: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Sweep:
    """One pass over the uncompressed model, kept in `folder` block by block: a run that was stopped goes on there."""
    states = HiddenStates(folder, torch.from_numpy(windows.ids), budget.windows_per_batch, SWEEP_STATES)
    measured = _Sweep(model, {t.name: t for t in plan if t.spec is not None}, recipe)
    own = {**identity, "tensors": list(measured.plan)}  # a part is of use to the same plan alone
    if done := measured.resume(states, folder / SWEEP_PART, own):
        warn(f"goes on measuring after {done} of {len(model.blocks)} blocks, kept in {folder}")
    for index in tqdm(range(done, len(model.blocks)), initial=done, unit="block", desc="measure", disable=None):
        with model.block(index):
            measured.block(index, states)
        part = {"sweep": asdict(measured.sweep), "blocks": index + 1, "states": measured.checksum}
        _keep(folder / SWEEP_PART, identity=own, **part)
        release_free_memory()
        budget.check_now(f"block {index}")
    _keep(folder / SWEEP, identity=identity, sweep=asdict(measured.sweep))
    return measured.sweep


def _keep(path: Path, **members: Any) -> None:
    write_durably(path, json.dumps(members, indent=1).encode())


class _Sweep:
    def __init__(self, model: BlockwiseModel, plan: dict[str, TensorPlan], recipe: Recipe) -> None:
        self.model, self.plan = model, plan
        self.specs, self.embeddings = candidates(recipe), embedding_candidates(recipe)
        self.sweep, self.checksum = Sweep(), 0

    def resume(self, states: HiddenStates, path: Path, identity: Mapping[str, Any]) -> int:
        """The number of blocks that are measured already, and the next one's input where it should be."""
        done = 0
        with suppress(*TORN, ConfigError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                if kept["blocks"] < len(self.model.blocks):
                    states.check(kept["blocks"], kept["states"])
                done, self.sweep, self.checksum = kept["blocks"], Sweep(**kept["sweep"]), kept["states"]
        if done:
            with self.model.materialised(self.model.outside_names(head=False)):
                self.model.learn_calls(states.batches)
        else:
            self._outside(states)
        return done

    def _outside(self, states: HiddenStates) -> None:
        for tensor in self.plan.values():
            if not tensor.in_block:
                with self.model.materialised([tensor.name]):
                    weight = find_tensor(self.model.skeleton, tensor.name)
                    rows = weight[:: max(1, len(weight) // EMBEDDING_ROWS)]
                    counts = torch.ones(len(rows), dtype=torch.float64)
                    measured = {key: _measure(rows, counts, spec, None, None) for key, spec in self.embeddings.items()}
                    self.sweep.errors[tensor.name] = measured
        with self.model.materialised(self.model.outside_names(head=False)):
            self.checksum = states.write(0, map(self.model.embed, states.batches))

    def block(self, index: int, states: HiddenStates) -> None:
        """Measure a block that has its weights, and make the next one's input."""
        stats, self.checksum = calibrate_and_advance(self.model, index, states)
        names = self.model.tensor_names(f"{self.model.block_name(index)}.")
        for readers, shared in by_input([self.plan[n] for n in names if n in self.plan], stats):
            self._layers(readers, shared)

    def _layers(self, readers: list[TensorPlan], stats: LayerStats | None) -> None:
        weights = [weight_of(self.model, tensor) for tensor in readers]
        factor: Factor | None = None
        if stats is not None:
            factor = factorize(stats, weights, next(iter(self.specs.values())), readers[0].name)
        for tensor, weight in zip(readers, weights, strict=True):
            self.sweep.inputs[tensor.name] = readers[0].name
            with error_context(tensor.name):
                rows, counts = _sample(weight, factor)
                # A sample with the largest weights in it has another unit of what an outlier is than the layer.
                unit = 1.0 if factor is None else outlier_unit(weight, factor) / outlier_unit(rows, factor)
                measured = {
                    key: _measure(rows, counts, _in_units(spec, unit), stats, factor)
                    for key, spec in self.specs.items()
                }
                self.sweep.errors[tensor.name] = measured


def _sample(weight: Tensor, factor: Factor | None) -> tuple[Tensor, Tensor]:
    """Some rows of weight [out, in], and how many of all rows each of them [n] f64 stands for."""
    n = len(weight)
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[:: max(1, n // SAMPLE_ROWS)] = True
    hot = torch.zeros_like(chosen)
    if factor is not None:
        largest = factor.stored(weight).square().mul_(factor.cost).amax(1)  # what it costs to lose it
        hot[largest.topk(min(HOT_ROWS, n)).indices] = True
    others = chosen & ~hot
    counts = others.double() * ((n - hot.sum()) / others.sum().clamp(min=1)) + hot
    return weight[chosen | hot], counts[chosen | hot]


def _in_units(spec: QuantSpec, unit: float) -> QuantSpec:
    """The spec, its threshold for outliers given in another unit."""
    if not spec.threshold or not math.isfinite(unit):
        return spec
    return replace(spec, outlier_threshold=spec.threshold * unit, outliers_pay=False)


def _measure(
    rows: Tensor, counts: Tensor, spec: QuantSpec, stats: LayerStats | None, factor: Factor | None
) -> tuple[float, float]:
    """(relative error, share of outliers) of rows [n, in], which stand for `counts` rows each, stored by `spec`.

    The error is the larger one of two, of the output's energy and of the same with every input scaled to length 1.
    Where the energy is that of a few tokens with massive activations, nothing else would count in the first, and a
    width that is ruinous for all other tokens would look good; in the second those few would hardly count.
    """
    spec = replace(spec, memory=min(spec.memory, MEMORY))
    if factor is None or stats is None or spec.method == "rtn":
        solution = rtn_quantize(rows, spec, stats)
    else:
        solution = gptq_quantize(rows, factor, spec)
    weighted = counts.sqrt().float()[:, None]
    lost, whole = weighted * (rows - solution.decoded), weighted * rows
    metrics = [None] if stats is None else [stats.hessian, stats.per_token]
    error = max(relative_error(output_energy(lost, metric), output_energy(whole, metric)) for metric in metrics)
    return error, _outlier_share(solution, counts)


def _outlier_share(solution: Solution, counts: Tensor) -> float:
    outliers = getattr(solution.layer, "outliers", None)
    if outliers is None:
        return 0.0
    found = np.diff(outliers.row_ptr.astype(np.int64)) @ counts.numpy()
    return float(found / (counts.numpy().sum() * solution.layer.shape[1]))
