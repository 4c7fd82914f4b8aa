"""What a run will need, known before it starts: memory as a bound that `--max-memory` is held against, and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qtool.errors import ConfigError
from qtool.gptq import MAX_ELEMENTS
from qtool.journal import Journal
from qtool.memory import peak_rss_bytes
from qtool.mixture import BATCH_ELEMENTS
from qtool.model import BlockwiseModel
from qtool.plan import TensorPlan
from qtool.recipe import GGML, Recipe
from qtool.sample import SAMPLES_PER_BATCH
from qtool.sensitivity import LOGITS_BACKWARD, windows_backward
from qtool.sizes import MAX_RUN, format_bytes, stored_bytes
from qtool.states import EXPERT_FILES, TOKENS_PER_BATCH, windows_per_batch

INTERPRETER_BYTES = 500_000_000  # Python with torch and transformers imported
COMPILER_BYTES = 170_000_000  # numba, which compiles experts' columns and what these formats need
COMPILED = ("trellis", "ternary", *GGML)
TOKENIZER_BYTES = 350_000_000  # a piece of calibration text while it is tokenized
SLACK = 1.15  # what the allocator holds free between tensors
SOLVER_COPIES = 11  # of a stripe of weights as float32: scaled, free, lost, codes, decoded, the grid's temporaries
EXPERT_COPIES = 6  # of experts that are solved together, what each leaves behind and Hessians included
GRADIENT_COPIES = 4  # of what a forward pass makes: kept for the way back, and the gradients there
LOGITS_COPIES = 9  # of the logits, where tokens are drawn from them and their likelihood is run back
HEADER_ROOM_BYTES = 16_000_000  # a generous bound: the header is written last, when it would be sad to fail


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How a run keeps to its memory."""

    windows_per_batch: int
    peak_rss_bytes: int  # a bound for the whole run
    states_bytes: int  # of all files of hidden states on disk, besides those of measuring
    measuring_bytes: int = 0  # of all that a target takes on disk while it is measured
    expert_batches: int = 1  # in memory together, one for each worker of a cluster at most
    max_memory_bytes: int | None = None

    def check_now(self, what: str) -> None:
        """Stop where more than the limit has been taken after all: what cannot be foreseen is the text's size."""
        if self.max_memory_bytes is not None and peak_rss_bytes() > self.max_memory_bytes:
            raise _too_little(self.max_memory_bytes, SLACK * peak_rss_bytes(), f"{what} takes that much")


def plan_budget(
    model: BlockwiseModel,
    plan: list[TensorPlan],
    recipe: Recipe,
    max_memory_bytes: int | None = None,
    workers: int = 1,
) -> Budget:
    """The largest batches that keep to `max_memory_bytes`; ConfigError names the least that the run needs.

    workers: of a cluster, which solve a batch of experts each; the process has all of these in memory
    """
    seq_len, n_windows = model.window_length(recipe.calibration.seq_len), recipe.n_windows
    states_bytes = 4 * n_windows * seq_len * int(model.config.hidden_size)
    windows, samples_itself = windows_per_batch(seq_len), "self" in recipe.calibration.sources
    sampling = _sampling_bytes(model, plan, seq_len) if n_windows and samples_itself else 0

    def peak_with(windows: int, experts: int) -> int:
        n_tokens = windows * seq_len if n_windows else 0
        return max(
            sampling, _peak_rss_bytes(model, plan, n_tokens, seq_len, experts, measures=recipe.target is not None)
        )

    while True:
        peak = peak_with(windows, 1)
        if max_memory_bytes is None or peak <= max_memory_bytes:
            experts = workers if any(tensor.is_expert for tensor in plan) else 1
            while experts > 1 and max_memory_bytes is not None and peak_with(windows, experts) > max_memory_bytes:
                experts //= 2  # how sums are rounded does not depend on it
            measuring = _measuring_bytes(states_bytes, n_windows, seq_len, windows, len(model.blocks))
            n_files = 2 + recipe.independent + len(EXPERT_FILES) * any(tensor.is_expert for tensor in plan)
            return Budget(
                windows_per_batch=windows,
                peak_rss_bytes=peak_with(windows, experts),
                states_bytes=n_files * states_bytes,
                measuring_bytes=measuring if recipe.target else 0,
                expert_batches=experts,
                max_memory_bytes=max_memory_bytes,
            )
        if windows == 1 or not n_windows:
            raise _too_little(max_memory_bytes, peak, "one block and its statistics take that much")
        windows //= 2


def _too_little(limit: int, needed: float, why: str) -> ConfigError:
    return ConfigError(f"--max-memory {format_bytes(limit)}: this run needs at least {format_bytes(needed)}: {why}")


def _measuring_bytes(states_bytes: int, n_windows: int, seq_len: int, windows_per_batch: int, n_blocks: int) -> int:
    """Of the gradients between all blocks, and beside them the hidden states of that pass, or those of the next one."""
    backward = min(n_windows, windows_backward(seq_len, windows_per_batch))
    windows = backward * (n_blocks + 1) + max(2 * n_windows, 2 * backward)
    return states_bytes * windows // max(n_windows, 1)


def _peak_rss_bytes(
    model: BlockwiseModel, plan: list[TensorPlan], n_tokens: int, seq_len: int, expert_batches: int, *, measures: bool
) -> int:
    """The largest of the moments of a run: a tensor outside the blocks is packed, a block is run, a layer is solved."""
    largest = max((6 * t.n_parameters for t in plan if not t.in_block), default=0)  # float32, and as it was stored
    names = set(model.outside_names(head=False))
    looked_up = sum(4 * t.n_parameters for t in plan if t.name in names)
    moments = [largest, TOKENIZER_BYTES * bool(n_tokens)]
    if measures:  # the head's way back
        logits = min(LOGITS_BACKWARD, n_tokens * model.vocab_size)
        moments.append(sum(4 * t.n_parameters for t in plan if not t.in_block) + LOGITS_COPIES * 4 * logits)
    for tensors in blocks_of(model, plan):
        moments += _expert_moments([t for t in tensors if t.is_expert], n_tokens, expert_batches)
        if not measures:  # a target's measuring has all experts in memory besides
            tensors = [t for t in tensors if not t.is_expert]
        weights = 4 * sum(t.n_parameters for t in tensors)
        # As float32 and as stored; fused tensors are put together from their parts, which doubles them.
        loading = sum((12 if len(t.shape) == 3 else 6) * t.n_parameters for t in tensors)
        running = _forward_bytes(model, tensors, n_tokens, seq_len)
        hessians = _hessians(tensors)
        if measures:
            solved = [t for t in tensors if t.spec is not None]
            costs = sum(4 * t.shape[1] ** 2 for t in solved)
            product = max((4 * (t.shape[1] ** 2 + t.n_parameters) for t in solved), default=0)
            moments.append(weights + GRADIENT_COPIES * running + costs + product)
            hessians += costs
        moments += [loading + looked_up * bool(n_tokens), weights + running + hessians]
        for tensor in tensors:
            if tensor.spec is not None:
                waiting = max(hessians - 8 * tensor.shape[1] ** 2, 0)  # those of inputs that are solved later
                moments.append(weights + waiting + _solver_bytes(tensor, calibrated=bool(n_tokens)))
    compiler = COMPILER_BYTES * any(t.spec is not None and (t.spec.format in COMPILED or t.is_expert) for t in plan)
    return int(INTERPRETER_BYTES + compiler + SLACK * max(moments))


def _expert_moments(experts: list[TensorPlan], n_tokens: int, batches: int = 1) -> list[int]:
    """Bytes while some experts of a block are in memory: they are calibrated, or one of their linears is solved."""
    if not experts:
        return []
    one = max(sum(t.n_parameters + t.shape[-1] ** 2 for t in experts[:4]), 1)
    together = 4 * EXPERT_COPIES * batches * (BATCH_ELEMENTS + one)
    activations = 4 * 4 * max(n_tokens, TOKENS_PER_BATCH) * max(max(t.shape) for t in experts)
    solver = max((_solver_bytes(t, calibrated=bool(n_tokens)) for t in experts if t.spec is not None), default=0)
    return [together + activations + solver]


def worker_bytes(plan: list[TensorPlan], n_tokens: int) -> int:
    """About what a worker of a cluster takes that solves the dearest piece of work, Ray's object store left out."""
    solved = [t for t in plan if t.spec is not None and t.in_block]
    one = [8 * t.n_parameters + _solver_bytes(t, calibrated=bool(n_tokens)) for t in solved if not t.is_expert]
    experts = _expert_moments([t for t in solved if t.is_expert], n_tokens)
    return int(INTERPRETER_BYTES + SLACK * max([*one, *experts], default=0))


def _sampling_bytes(model: BlockwiseModel, plan: list[TensorPlan], seq_len: int) -> int:
    """Bytes of letting the model write: all of it as float32, and the keys and values of what it has written."""
    cache = 2 * 4 * SAMPLES_PER_BATCH * seq_len * int(model.config.hidden_size) * len(model.blocks)
    return int(INTERPRETER_BYTES + SLACK * (6 * sum(t.n_parameters for t in plan) + 2 * cache))


def blocks_of(model: BlockwiseModel, plan: list[TensorPlan]) -> list[list[TensorPlan]]:
    """The tensors of each block."""
    found: dict[int | None, list[TensorPlan]] = {}
    for tensor in plan:
        if tensor.in_block:
            number = model.lists.number(tensor.name)
            found.setdefault(number, []).append(tensor)
    return list(found.values())


def _hessians(tensors: Iterable[TensorPlan]) -> int:
    """Bytes of a block's Hessians while they are summed; of one width there are rarely more than four inputs."""
    widths = [t.shape[1] for t in tensors if t.spec is not None]
    return sum(4 * n * n * min(widths.count(n), 4) for n in set(widths)) + 4 * max(widths, default=0) ** 2


def _solver_bytes(tensor: TensorPlan, *, calibrated: bool) -> int:
    """Bytes of solving one layer besides the block: the Hessian and its factor, a stripe's temporaries, the result."""
    hessian = 4 * tensor.shape[1] ** 2 if calibrated else 0
    # Hessian, damped and a float64 to factor; or Hessian, damped, factor and the temporaries of a stripe.
    is_trellis = tensor.spec is not None and tensor.spec.format == "trellis"
    stripe = max(MAX_ELEMENTS, MAX_RUN * tensor.shape[1] * is_trellis)  # a path is solved in one go
    factoring, solving = 5 * hessian, 3 * hessian + 4 * SOLVER_COPIES * min(tensor.n_parameters, stripe)
    return max(factoring, solving) + 7 * tensor.n_parameters  # decoded, codes, and packed twice


def _forward_bytes(model: BlockwiseModel, tensors: Iterable[TensorPlan], n_tokens: int, seq_len: int) -> int:
    """Bytes of one batch's activations in a block."""
    widths = sum(max(t.shape) for t in tensors if len(t.shape) == 2)
    scores = 0
    # Others never hold the scores as a whole, but where values have a width of their own, torch falls back to that.
    if getattr(model.config, "_attn_implementation", None) == "eager" or hasattr(model.config, "v_head_dim"):
        scores = 3 * 4 * int(model.config.num_attention_heads) * n_tokens * seq_len
    biases = 0
    if hasattr(model.config, "relative_attention_num_buckets"):  # of three attentions, kept for two shapes
        biases = 6 * 4 * int(model.config.num_attention_heads) * (seq_len // 2 + 1) ** 2
    return 4 * n_tokens * widths + scores + biases


def file_bytes(plan: Iterable[TensorPlan], files: Mapping[str, bytes]) -> int:
    """A bound for the size of the file."""
    return sum(stored_bytes(t.encoding, t.shape) for t in plan) + sum(map(len, files.values())) + HEADER_ROOM_BYTES


def check_disk_for_states(journal: Journal, budget: Budget) -> None:
    """Refuse to measure for a target when the work folder has not the space for what that takes."""
    _require_with_journal(journal, budget.measuring_bytes)


def check_disk(journal: Journal, plan: list[TensorPlan], files: Mapping[str, bytes], budget: Budget) -> None:
    """Refuse to start when the work folder, or the output where that lies elsewhere, has not the space for the run."""
    whole = file_bytes(plan, files)
    _require_with_journal(journal, whole + budget.states_bytes)
    if os.stat(journal.folder).st_dev != os.stat(journal.output.parent).st_dev:
        _require(journal.output.parent, whole)


def _require_with_journal(journal: Journal, needed: int) -> None:
    """The same of the work folder, where a run that was stopped has taken some of it already."""
    used = sum(path.stat().st_size for path in journal.folder.iterdir())
    _require(journal.folder, max(needed - used, 0))


def _require(folder: Any, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: the run needs {format_bytes(needed)} of disk space there, {format_bytes(free)} are free; "
            "make room, or give another --output or --work-dir"
        )
