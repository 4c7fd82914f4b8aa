"""Which layer gets which bits, so that a file meets its target size (`--target-size`, `--target-bits`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qtool.allocate import Allocation, Candidate, allocate
from qtool.errors import ConfigError
from qtool.fit import planned_encoding
from qtool.plan import TensorPlan
from qtool.recipe import QuantSpec, Recipe
from qtool.sizes import format_bytes, stored_bytes
from qtool.sweep import Sweep, candidates, embedding_candidates, key_of

LEAST_SHARE = 2e-5
"""Some rows spoke for all of a layer's outliers: this is set aside besides, for single ones; no others are kept."""
MOST_OUTLIERS = 0.49


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The spec of every tensor that the target chose one for."""

    specs: Mapping[str, QuantSpec]
    allocation: Allocation
    loss: float  # nats a token: of all tensors that are quantized, also by the user's own choice


def spread_bits(plan: Sequence[TensorPlan], sweep: Sweep, recipe: Recipe, other_bytes: int) -> Spread:
    """The specs that lose least within the recipe's target. ConfigError names the least that is possible.

    other_bytes: of the file, besides the sections of tensors.
    """
    assert recipe.target is not None
    groups = _groups(plan, recipe, sweep.inputs)
    options = [_options(group, sweep, recipe) for group in groups]
    chosen = {tensor.name for group in groups for tensor in group}
    layers = [[Candidate(n_bytes, loss) for _, n_bytes, loss in option] for option in options]
    given = _given(plan, sweep)
    plan = [replace(t, encoding=planned_encoding(given[t.name], t.shape)) if t.name in given else t for t in plan]
    budget = _budget(plan, chosen, recipe, other_bytes)
    allocation = allocate(layers, budget)
    if allocation is None:
        least = sum(min(c.n_bytes for c in layer) for layer in layers)
        raise _too_small(recipe, plan, budget, least)
    specs = {
        tensor.name: option[i][0][tensor.name]
        for group, option, i in zip(groups, options, allocation.choice, strict=True)
        for tensor in group
    }
    rest = [t for t in plan if t.spec is not None and t.name not in chosen]
    loss = allocation.loss + sum(sweep.losses[t.name][key_of(t.spec)][0] for t in rest if t.spec)
    return Spread(specs=specs | given, allocation=allocation, loss=loss)


def _groups(plan: Sequence[TensorPlan], recipe: Recipe, inputs: Mapping[str, str]) -> list[list[TensorPlan]]:
    """Tensors that are decided together."""
    assert recipe.target is not None
    found: dict[str, list[TensorPlan]] = {}
    for tensor in plan:
        if tensor.spec is None or tensor.is_overridden:
            continue
        if not tensor.in_block and (recipe.target.bits or recipe.embeddings):
            continue  # not counted by the target, or given by the user
        found.setdefault(inputs.get(tensor.name, tensor.name) if recipe.fused else tensor.name, []).append(tensor)
    return list(found.values())


def _options(
    group: Sequence[TensorPlan], sweep: Sweep, recipe: Recipe
) -> list[tuple[dict[str, QuantSpec], int, float]]:
    """(spec of each tensor, bytes, loss) of every way to store a group."""
    specs = candidates(recipe) if group[0].in_block else embedding_candidates(recipe)
    made = []
    for key, spec in specs.items():
        own = {tensor.name: _capped(spec, sweep.losses[tensor.name][key][1]) for tensor in group}
        n_bytes = sum(stored_bytes(planned_encoding(own[tensor.name], tensor.shape), tensor.shape) for tensor in group)
        loss = sum(sweep.losses[tensor.name][key][0] for tensor in group)
        made.append((own, n_bytes, loss))
    return made


def _capped(spec: QuantSpec, share: float) -> QuantSpec:
    """The spec with an upper bound for what a threshold keeps: the share that was measured."""
    if not spec.threshold:
        return spec
    return replace(spec, outliers=min(spec.outliers or MOST_OUTLIERS, share + LEAST_SHARE))


def with_outliers(tensor: TensorPlan) -> TensorPlan:
    """The tensor with as many outliers as its threshold could ever keep: what the header says of it is longest then."""
    if tensor.spec is None or not tensor.spec.threshold:
        return tensor
    spec = replace(tensor.spec, outliers=tensor.spec.outliers or MOST_OUTLIERS)
    return replace(tensor, encoding=planned_encoding(spec, tensor.shape))


def _given(plan: Sequence[TensorPlan], sweep: Sweep) -> dict[str, QuantSpec]:
    """The specs of layers whose bits the user gave, with a bound for their outliers."""
    given = {t.name: t.spec for t in plan if t.is_overridden and t.in_block and t.spec is not None}
    return {name: _capped(spec, sweep.losses[name][key_of(spec)][1]) for name, spec in given.items()}


def _budget(plan: Sequence[TensorPlan], chosen: set[str], recipe: Recipe, other_bytes: int) -> int:
    """Bytes for the chosen tensors' sections."""
    assert recipe.target is not None
    if recipe.target.size_bytes:
        others = [tensor for tensor in plan if tensor.name not in chosen]
        return recipe.target.size_bytes - other_bytes - sum(stored_bytes(t.encoding, t.shape) for t in others)
    linears = [tensor for tensor in plan if tensor.is_block_linear]
    whole = int(recipe.target.bits * sum(tensor.n_parameters for tensor in linears) / 8)
    return whole - sum(stored_bytes(t.encoding, t.shape) for t in linears if t.name not in chosen)


def _too_small(recipe: Recipe, plan: Sequence[TensorPlan], budget: int, least: int) -> ConfigError:
    assert recipe.target is not None
    if recipe.target.size_bytes:
        needed = recipe.target.size_bytes - budget + least
        return ConfigError(
            f"--target-size {format_bytes(recipe.target.size_bytes)}: this model takes at least {_kilobytes(needed)}"
        )
    n_parameters = sum(tensor.n_parameters for tensor in plan if tensor.is_block_linear)
    needed_bits = recipe.target.bits + 8 * (least - budget) / n_parameters
    least_bits = math.ceil(1000 * needed_bits) / 1000
    return ConfigError(f"--target-bits {recipe.target.bits:g}: this model takes at least {least_bits:.3f}")


def _kilobytes(n_bytes: int) -> str:
    """As a target that can be given: never rounded down."""
    return f"{-(-n_bytes // 1000)} kB"
