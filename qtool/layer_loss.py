"""What a layer's rounding costs the model at each width, measured on some of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from calibration.hessian import LayerStats
from qtool.energy import output_energy, relative_error
from qtool.factor import Factor
from qtool.gptq import Solution, gptq_quantize, outlier_unit, rtn_quantize
from qtool.recipe import QuantSpec
from qtool.sensitivity import TOKENS, Cost

SAMPLE_ROWS, HOT_ROWS = 96, 32
"""Rows of a layer that are solved at each width; rows do not touch each other, so some speak for all. But one weight
far from all others can cost more than the rest of its layer: the rows of the largest are always among them."""
MEMORY = 6
"""Of a trellis while it is measured: a longer one lowers the error of every layer by much the same share."""
EMBEDDING_ROWS = 4096


def layer_losses(
    weight: Tensor, specs: Mapping[str, QuantSpec], stats: LayerStats | None, factor: Factor | None, cost: Cost | None
) -> dict[str, tuple[float, float]]:
    """(KL divergence in nats a token, share of outliers) of weight [out, in] stored by each spec.

    Without a cost, for a layer that no token reached: its relative error, as if losing it cost 1 nat at one token.
    """
    chosen, counts = sample_rows(weight, factor)
    rows = weight[chosen]
    # A sample with the largest weights in it has another unit of what an outlier is than the layer.
    unit = 1.0 if factor is None else outlier_unit(weight, factor) / outlier_unit(rows, factor)
    loss = _loss_of_rows(cost, rows, chosen, counts)
    return {key: _measure(rows, counts, _in_units(spec, unit), stats, factor, loss) for key, spec in specs.items()}


def embedding_losses(
    weight: Tensor, specs: Mapping[str, QuantSpec], lookups: Tensor | None, head: Cost | None
) -> dict[str, tuple[float, float]]:
    """The same of an embedding [vocab, hidden]; the rows that cost most speak for all.

    lookups: [vocab], what errors cost where it is looked up, if it is; head: where it scores tokens, if it does.
    """
    cost = torch.zeros(len(weight))
    if lookups is not None:
        cost += lookups
    if head is not None:
        cost += head.outputs * head.inputs.diagonal().mean()
    chosen = cost.topk(min(EMBEDDING_ROWS, len(cost))).indices
    share = max(float(cost[chosen].sum() / cost.sum().clamp(min=1e-30)), 1e-30)
    rows, losses = weight[chosen], {}
    for key, spec in specs.items():
        lost, loss = rows - rtn_quantize(rows, spec, None).decoded, 0.0
        if lookups is not None:
            loss += float(lookups[chosen] @ lost.square().sum(1))
        if head is not None:
            loss += head.of(lost, head.outputs[chosen])
        losses[key] = (loss / share, 0.0)
    return losses


def _loss_of_rows(cost: Cost | None, rows: Tensor, chosen: Tensor, counts: Tensor) -> Callable[[Tensor], float]:
    """What it costs to lose a part of the chosen rows, in nats a token, for the whole layer."""
    if cost is None:
        share = counts.sqrt().float()[:, None]
        whole = output_energy(share * rows, None)
        return lambda lost: relative_error(output_energy(share * lost, None), whole) / TOKENS
    outputs = counts * cost.outputs[chosen]
    outputs = outputs / outputs.sum().clamp(min=1e-30)  # whose sum is known to be 1 for all rows together
    return lambda lost: cost.of(lost, outputs)


def sample_rows(weight: Tensor, factor: Factor | None) -> tuple[Tensor, Tensor]:
    """Some rows of weight [out, in], and how many of all rows each of them [n] f64 stands for."""
    n = len(weight)
    even = torch.zeros(n, dtype=torch.bool)
    even[:: max(1, n // SAMPLE_ROWS)] = True
    hot = torch.zeros_like(even)
    if factor is not None:
        largest = factor.stored(weight).square().mul_(factor.cost).amax(1)  # what it costs to lose it
        hot[largest.topk(min(HOT_ROWS, n)).indices] = True
    others = even & ~hot
    counts = others.double() * ((n - hot.sum()) / others.sum().clamp(min=1)) + hot
    chosen = (even | hot).nonzero()[:, 0]
    return chosen, counts[chosen]


def _in_units(spec: QuantSpec, unit: float) -> QuantSpec:
    """The spec, its threshold for outliers given in another unit."""
    if not spec.threshold or not math.isfinite(unit):
        return spec
    return replace(spec, outlier_threshold=spec.threshold * unit, outliers_pay=False)


def _measure(
    rows: Tensor,
    counts: Tensor,
    spec: QuantSpec,
    stats: LayerStats | None,
    factor: Factor | None,
    loss: Callable[[Tensor], float],
) -> tuple[float, float]:
    """(loss, share of outliers) of rows [n, in], which stand for `counts` rows each, stored by `spec`."""
    spec = replace(spec, memory=min(spec.memory, MEMORY))
    if factor is None or stats is None or spec.method == "rtn":
        solution = rtn_quantize(rows, spec, stats)
    else:
        solution = gptq_quantize(rows, factor, spec)
    return loss(rows - solution.decoded), _outlier_share(solution, counts)


def _outlier_share(solution: Solution, counts: Tensor) -> float:
    outliers = getattr(solution.layer, "outliers", None)
    if outliers is None:
        return 0.0
    found = np.diff(outliers.row_ptr.astype(np.int64)) @ counts.numpy()
    return float(found / (counts.numpy().sum() * solution.layer.shape[1]))
