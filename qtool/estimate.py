"""What a run would give and cost, without quantizing anything (`--dry-run`)."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from qtool.budget import blocks_of, worker_bytes
from qtool.job import Job
from qtool.model import BlockwiseModel
from qtool.plan import TensorPlan
from qtool.recipe import Recipe
from qtool.sizes import bits_per_weight, stored_bytes

HEADER_BYTES = 2500  # config, recipe, provenance and the entries of the tokenizer's files
ENTRY_BYTES = 160  # one tensor in the header besides its name: shape, place, SHA-256
QUANTIZED_ENTRY_BYTES = 250  # the same with bits, group size and error
START_SECONDS = 8.0  # imports, tokenizer, reading and tokenizing the text
# Measured on the reference model against a plain matrix product: what else a forward pass does, and what a weight
# costs in the scale search and the solver, mostly passes over memory.
FORWARD_EFFICIENCY = 0.7
SOLVER_OPERATIONS = 100_000


def estimate_run(job: Job, workers: int = 0) -> dict[str, Any]:
    """Size and bits per weight to the byte but for the header; memory and time to within some tens of percent.

    workers: of a cluster; what they take is no part of `peak_rss_bytes`.
    """
    model, plan, recipe, budget = job.model, job.plan, job.recipe, job.budget
    quantized = sum(t.n_parameters for t in plan if t.spec is not None)
    parameters = sum(t.n_parameters for t in plan)
    files = sum(map(len, job.files.values()))
    return {
        "file_bytes": sum(stored_bytes(t.encoding, t.shape) + _entry_bytes(t) for t in plan) + HEADER_BYTES + files,
        "parameters": parameters,
        "bits_per_weight": bits_per_weight((t.encoding, t.shape) for t in plan if t.is_block_linear),
        "quantized_share": quantized / parameters,
        "peak_rss_bytes": budget.peak_rss_bytes,
        "workers": workers,
        "worker_bytes": worker_bytes(plan, recipe.n_windows) if workers else 0,
        "work_bytes": budget.states_bytes,  # a target is measured by now
        "seconds": _seconds(model, plan, recipe),
        "layers": [
            {
                "name": t.name,
                "bits": t.spec.bits,
                "group_size": t.spec.group_size,
                "outliers": t.spec.keeps_outliers,
                "bytes": stored_bytes(t.encoding, t.shape),
            }
            for t in plan
            if t.spec
        ],
        "predicted_kl": job.spread and job.spread.loss,
        "allocation_gap": job.spread.allocation.gap if job.spread else 0.0,
        "outliers_by_threshold": any(t.spec and t.spec.threshold and not t.spec.outliers for t in plan),
        "left_dense": [{"name": t.name, "reason": t.reason} for t in plan if t.spec is None],
    }


def _entry_bytes(tensor: TensorPlan) -> int:
    return len(tensor.name) + (ENTRY_BYTES if tensor.spec is None else QUANTIZED_ENTRY_BYTES)


def _seconds(model: BlockwiseModel, plan: list[TensorPlan], recipe: Recipe) -> float:
    """Two forward passes, the Hessians and the solver, at the speed of this machine's matrix product."""
    seq_len = model.window_length(recipe.calibration.seq_len)
    n_tokens = recipe.n_windows * seq_len
    operations = 0.0
    for tensors in blocks_of(model, plan):
        linears = [t for t in tensors if t.spec is not None]
        weights = sum(t.n_parameters for t in linears)
        attention = 4 * n_tokens * seq_len * int(model.config.hidden_size)
        hessians = sum(n_tokens * n * n for n in {t.shape[1] for t in linears})
        operations += (2 * (2 * n_tokens * weights + attention) + hessians) / FORWARD_EFFICIENCY
        operations += SOLVER_OPERATIONS * weights if n_tokens else 0
    return START_SECONDS + operations / _flops()


def _flops() -> float:
    """Float operations a second of this machine's matrix product, timed for a moment."""
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return float(2 * math.prod(a.shape) * a.shape[0] / min(times))
