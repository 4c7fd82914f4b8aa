"""What each layer costs the model at each width: measured once, kept in the work folder, and used for every target."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.hessian import LayerStats
from calibration.windows import TokenWindows
from formats.errors import error_context
from qtool.budget import Budget
from qtool.checkpoint import find_tensor
from qtool.errors import ConfigError
from qtool.factor import Factor, factorize
from qtool.journal import SWEEP, SWEEP_PART, SWEEP_STATES, write_durably
from qtool.layer_loss import embedding_losses, layer_losses
from qtool.model import BlockwiseModel
from qtool.numerics import release_free_memory
from qtool.plan import TensorPlan, by_input, weight_of
from qtool.recipe import BITS, QuantSpec, Recipe
from qtool.sensitivity import Cost, Gradients
from qtool.states import HiddenStates, calibrate_and_advance

LEAST_HALVED = 64
"""Groups this long are also measured at half the length."""
EMBEDDING_BITS = range(2, 9)
TORN = (OSError, ValueError, KeyError, TypeError)
"""What reading a broken file, or one that is not there, raises: it is measured again."""
REVISION = 2
"""Of how losses are measured: to be raised when that changes."""


@dataclass(slots=True)
class Sweep:
    """What was measured."""

    # tensor -> key of a candidate -> KL divergence that it costs in nats a token, share of outliers
    losses: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # linear -> the first one of those that read its input


def candidates(recipe: Recipe) -> dict[str, QuantSpec]:
    """The ways to store a layer of the blocks that a target chooses from, by key."""
    spec = recipe.linears
    variants = [spec]
    if spec.format != "trellis" and spec.group_size >= LEAST_HALVED:  # a path's levels fit each other, not each group
        variants.append(replace(spec, group_size=spec.group_size // 2))
    if spec.keeps_outliers and not spec.outliers_pay:  # their price says how many each width is to keep
        variants += [replace(v, outliers=0.0, outlier_threshold=0.0, outliers_pay=False) for v in variants]
    widths = recipe.widths or BITS[spec.format]
    return {key_of(made): made for v in variants for made in (replace(v, bits=bits) for bits in widths)}


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
        if (sweep := _read_sweep(path, identity)) is not None and names <= sweep.losses.keys():
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
    """Some windows forward and back, then a pass over the uncompressed model with all, which is kept in `folder` block
    by block: a run that was stopped goes on there."""
    ids, in_batch = _mixed(windows.ids, recipe), budget.windows_per_batch
    states, gradients = HiddenStates(folder, ids, in_batch, SWEEP_STATES), Gradients(model, ids, folder, in_batch)
    measured = _Sweep(model, {t.name: t for t in plan if t.spec is not None}, recipe, states, gradients)
    own = {**identity, "tensors": list(measured.plan)}  # a part is of use to the same plan alone
    if done := measured.resume(folder / SWEEP_PART, own):
        warn(f"goes on measuring after {done} of {len(model.blocks)} blocks, kept in {folder}")
    else:
        measured.begin()
    for index in tqdm(range(done, len(model.blocks)), initial=done, unit="block", desc="measure", disable=None):
        with model.block(index):
            measured.block(index)
        _keep(folder / SWEEP_PART, identity=own, blocks=index + 1, **measured.part())
        gradients.remove(index)
        release_free_memory()
        budget.check_now(f"block {index}")
    _keep(folder / SWEEP, identity=identity, sweep=asdict(measured.sweep))
    return measured.sweep


def _mixed(ids: Any, recipe: Recipe) -> Tensor:
    """The windows [n, seq] with those of every source in turn: the first of them are run backward."""
    parts = [part.tolist() for part in torch.arange(len(ids)).tensor_split(len(recipe.calibration.sources))]
    order = [index for turn in zip_longest(*parts) for index in turn if index is not None]
    return torch.from_numpy(ids)[order]


def _keep(path: Path, **members: Any) -> None:
    write_durably(path, json.dumps(members, indent=1).encode())


class _Sweep:
    def __init__(
        self,
        model: BlockwiseModel,
        plan: dict[str, TensorPlan],
        recipe: Recipe,
        states: HiddenStates,
        gradients: Gradients,
    ) -> None:
        self.model, self.plan, self.states, self.gradients = model, plan, states, gradients
        self.specs, self.embeddings = candidates(recipe), embedding_candidates(recipe)
        self.sweep = Sweep()
        self.checksums: dict[str, Any] = {}  # of what the next block reads

    def resume(self, path: Path, identity: Mapping[str, Any]) -> int:
        """The number of blocks that are measured already, and the next one's input where it should be."""
        done = 0
        with suppress(*TORN, ConfigError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                if kept["blocks"] < len(self.model.blocks):
                    self.states.check(kept["blocks"], kept["states"])
                self.gradients.check(kept["gradients"], kept["blocks"])
                done, self.sweep = kept["blocks"], Sweep(**kept["sweep"])
                self.checksums = {name: kept[name] for name in ("states", "gradients")}
        if done:
            with self.model.materialised(self.model.outside_names(head=False)):
                self.model.learn_calls(self.states.batches)
        return done

    def part(self) -> dict[str, Any]:
        """What `resume` goes on from."""
        return {"sweep": asdict(self.sweep), **self.checksums}

    def begin(self) -> None:
        """Make the gradients and the first block's input, and measure what lies outside the blocks."""
        self.checksums["gradients"] = self.gradients.write()
        lookups, head = self.gradients.costs_of_lookups(), self.gradients.cost_of_head()
        ends = self.model.skeleton.get_input_embeddings(), self.model.skeleton.get_output_embeddings()
        for tensor in self.plan.values():
            if not tensor.in_block:
                with self.model.materialised([tensor.name]):
                    weight = find_tensor(self.model.skeleton, tensor.name)
                    at_end = [end is not None and end.weight is weight for end in ends]
                    rows = lookups if at_end[0] else None, head if at_end[1] else None
                    self.sweep.losses[tensor.name] = embedding_losses(weight, self.embeddings, *rows)
        with self.model.materialised(self.model.outside_names(head=False)):
            self.checksums["states"] = self.states.write(0, map(self.model.embed, self.states.batches))

    def block(self, index: int) -> None:
        """Measure a block that has its weights, and make the next one's input."""
        costs = self.gradients.costs(index, self.states.read(index))
        stats, self.checksums["states"] = calibrate_and_advance(self.model, index, self.states)
        names = self.model.tensor_names(f"{self.model.block_name(index)}.")
        for readers, shared in by_input([self.plan[n] for n in names if n in self.plan], stats):
            self._layers(readers, shared, costs)

    def _layers(self, readers: list[TensorPlan], stats: LayerStats | None, costs: Mapping[str, Cost]) -> None:
        weights = [weight_of(self.model, tensor) for tensor in readers]
        factor: Factor | None = None
        if stats is not None:
            factor = factorize(stats, weights, next(iter(self.specs.values())), readers[0].name)
        for tensor, weight in zip(readers, weights, strict=True):
            self.sweep.inputs[tensor.name] = readers[0].name
            with error_context(tensor.name):
                found = layer_losses(weight, self.specs, stats, factor, costs.get(tensor.layer))
                self.sweep.losses[tensor.name] = found
