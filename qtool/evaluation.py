"""Perplexity of a model or file, and how far its predictions are from a baseline's.

What is scored is `qtool.protocol`'s, the figures are `qtool.figures`'. Here the models run, one block at a time over
as many windows as STATES_BYTES hold the hidden states of, so that memory grows neither with the text nor with the
depth of the model. A weight is read and decoded once for each such round: little beside what the round computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.corpus import read_text
from qtool.checkpoint import Checkpoint
from qtool.errors import ConfigError, QuantizeError
from qtool.figures import Estimate, Predictions, Stretches, Values, collected, mean, perplexity, token_scores
from qtool.logits_file import BaselineWriter, SavedBaseline
from qtool.mixture import run_block
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32
from qtool.protocol import Protocol, Sample, Windows, cut_windows, scored
from qtool.seq2seq import blockwise_model
from qtool.states import windows_per_batch

LOGITS_AT_A_TIME = 1 << 22  # 16 MB as float32: a vocabulary is wide, and comparing two models takes several
STATES_BYTES = 1 << 30  # all models' hidden states between two blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Figures of one evaluation, and what they are of."""

    model: str
    sample: Sample
    error_over: str  # windows (stretches of text as long as one) or tokens: what the error bars take for independent
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Flat; an estimate's error under its name and `_error`; what is not known is left out."""
        values: dict[str, Any] = {"model": self.model}
        common = [field.name for field in fields(Result)]
        for name in sorted((field.name for field in fields(self)), key=common.__contains__):  # the figures come first
            value = getattr(self, name)
            if isinstance(value, Sample):
                values |= asdict(value)
            elif isinstance(value, Estimate):
                values |= {name: value.value, f"{name}_error": value.error}
            else:
                values[name] = value
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult(Result):
    """The baseline's figures are None without one; KL is in nats, from baseline to model."""

    perplexity: Estimate
    baseline_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    same_top: float | None = None  # share of positions where both models' most likely token is the same
    kv_bits: int | None = None  # of the keys and values that the model reads; None: as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceResult(Result):
    """KL is in nats, from baseline to model; its percentiles and maximum are over single tokens."""

    perplexity: Estimate
    baseline_perplexity: Estimate
    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p50: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    same_top: Estimate  # share of positions where both models' most likely token is the same


def evaluate_perplexity(
    checkpoint: Checkpoint,
    *,
    data: str,
    protocol: Protocol | None = None,
    baseline: Checkpoint | None = None,
    text_field: str = "text",
    kv_bits: int | None = None,
) -> PerplexityResult:
    """Perplexity of `checkpoint` on the text `data`, with `baseline` compared token by token.

    kv_bits: of the keys and values that `checkpoint` reads, as `generate` caches them; the baseline's are as they are.
    """
    started = time.perf_counter()
    models = [blockwise_model(checkpoint, kv_bits=kv_bits)]
    models += [] if baseline is None else [blockwise_model(baseline)]
    windows = _windows(models, data, text_field, protocol or Protocol())
    with exact_float32():
        parts = (token_scores(*predictions) for predictions in _predictions(models, windows))
        scores = collected(parts, windows.sample.tokens)
    stretches = windows.stretches()
    figures: dict[str, Any] = {}
    if baseline is not None:
        figures["baseline_perplexity"] = perplexity(scores["baseline_nll"], stretches).value
        figures["kl_mean"] = float(scores["kl"].mean())
        figures["kl_p99"] = float(np.percentile(scores["kl"], 99))
        figures["same_top"] = float(scores["same_top"].mean())
    return PerplexityResult(
        perplexity=perplexity(scores["nll"], stretches),
        kv_bits=kv_bits,
        **figures,
        **_common(checkpoint, windows.sample, stretches, started),
    )


def evaluate_divergence(
    checkpoint: Checkpoint,
    baseline: Checkpoint | Path,
    *,
    data: str,
    protocol: Protocol | None = None,
    text_field: str = "text",
    save_baseline: Path | None = None,
) -> DivergenceResult:
    """How far `checkpoint` is from `baseline` on the text `data`.

    baseline: a model, or the file that an earlier call made with `save_baseline`.
    save_baseline: a new file for the predictions of a baseline that is a model.
    """
    started = time.perf_counter()
    models = [blockwise_model(c) for c in (checkpoint, baseline) if isinstance(c, Checkpoint)]
    windows = _windows(models, data, text_field, protocol or Protocol())
    shape = windows.sample, models[0].vocab_size
    with exact_float32(), ExitStack() as stack:
        saved = stack.enter_context(SavedBaseline(baseline, *shape)) if isinstance(baseline, Path) else None
        writer = stack.enter_context(BaselineWriter(save_baseline, *shape)) if save_baseline else None
        scores = collected(_compared(models, windows, saved, writer), windows.sample.tokens)
        if writer:
            writer.finish()
    return _divergence(scores, checkpoint, windows, started)


def _compared(
    models: list[BlockwiseModel], windows: Windows, saved: SavedBaseline | None, writer: BaselineWriter | None
) -> Iterator[dict[str, Tensor]]:
    """The scores of the first model against what is saved, or against the second, which is written on the way."""
    for predictions in _predictions(models, windows):
        base = saved.read(len(predictions[0].nll)) if saved else predictions[1]
        if writer:
            writer.write(base)
        yield token_scores(predictions[0], base)


def _divergence(
    scores: dict[str, Values], checkpoint: Checkpoint, windows: Windows, started: float
) -> DivergenceResult:
    stretches = windows.stretches()
    nll, base_nll, kl = scores["nll"], scores["baseline_nll"], scores["kl"]
    p50, p95, p99 = (float(value) for value in np.percentile(kl, [50, 95, 99]))
    return DivergenceResult(
        perplexity=perplexity(nll, stretches),
        baseline_perplexity=perplexity(base_nll, stretches),
        perplexity_ratio=perplexity(nll - base_nll, stretches),
        kl_mean=mean(kl, stretches),
        kl_p50=p50,
        kl_p95=p95,
        kl_p99=p99,
        kl_max=float(kl.max()),
        same_top=mean(scores["same_top"], stretches),
        **_common(checkpoint, windows.sample, stretches, started),
    )


def _common(checkpoint: Checkpoint, sample: Sample, stretches: Stretches | None, started: float) -> dict[str, Any]:
    over = "tokens" if stretches is None else "windows"
    return {"model": checkpoint.name, "sample": sample, "error_over": over, "seconds": time.perf_counter() - started}


def _windows(models: list[BlockwiseModel], data: str, text_field: str, protocol: Protocol) -> Windows:
    """The windows that all `models` can take; the first one's tokenizer reads the text."""
    if len({model.vocab_size for model in models}) > 1:
        sizes = " and ".join(str(model.vocab_size) for model in models)
        raise ConfigError(f"model and baseline have vocabularies of {sizes} tokens: not the same model")
    if len({model.has_encoder for model in models}) > 1:
        raise ConfigError("of model and baseline, one has an encoder and the other has none: not the same model")
    longest = min((m.max_seq_len for m in models if m.max_seq_len), default=None)
    text = read_text(data, split="test", text_field=text_field)
    halves = models[0].has_encoder
    windows = cut_windows(text, models[0].checkpoint.tokenizer(), protocol, longest=longest, source=data, halves=halves)
    for model in models:
        model.check_tokens(windows.ids)
    return windows


def _predictions(models: list[BlockwiseModel], windows: Windows) -> Iterator[list[Predictions]]:
    """Each model's predictions for the scored tokens, in their order, some at a time."""
    seq_len = windows.sample.seq_len
    in_batch = windows_per_batch(seq_len)
    widths = sum(int(model.config.hidden_size) for model in models)
    # A mixture's tokens lie on disk meanwhile, what it reads and what it gives: as large as the states each.
    copies = 3 if any(model.mixture(i) for model in models for i in range(len(model.blocks))) else 1
    in_round = max(STATES_BYTES // (4 * seq_len * widths * in_batch * copies), 1) * in_batch
    rounds = list(windows.split(in_round))
    n_batches = sum(-(-len(ids) // in_batch) for ids, _ in rounds)
    total = len(rounds) * sum(len(model.blocks) for model in models) + n_batches
    with tqdm(total=total, desc="evaluate", unit="step", disable=None) as bar:
        for ids, first in rounds:
            batches = ids.split(in_batch)
            hidden = [_run_blocks(model, batches, bar) for model in models]
            with ExitStack() as stack:
                for model in models:
                    stack.enter_context(model.outside(head=True))
                for index, (batch, start) in enumerate(zip(batches, first.split(in_batch), strict=True)):
                    positions = scored(start, seq_len)
                    states = [
                        m.before(h[index])[positions] for m, h in zip(models, hidden, strict=True)
                    ]  # [n, hidden] of each model
                    yield from _score(models, states, batch[:, 1:][positions])
                    bar.update()


def _run_blocks(model: BlockwiseModel, batches: tuple[Tensor, ...], bar: Any) -> list[Tensor]:
    """The last block's output for every batch of ids."""
    with model.outside(head=False):
        hidden = [model.embed(ids) for ids in batches]
    for index in range(len(model.blocks)):
        for i, states in enumerate(run_block(model, index, hidden)):  # in place: the states are what memory goes to
            hidden[i] = _finite(states, model, model.block_name(index))
        bar.update()
    return hidden


def _score(models: list[BlockwiseModel], states: list[Tensor], targets: Tensor) -> Iterator[list[Predictions]]:
    """As `_predictions`, from the last block's output [n, hidden] at positions before the tokens `targets` [n]."""
    step = max(1, LOGITS_AT_A_TIME // models[0].vocab_size)
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        yield [
            Predictions.of(_log_probs(model, h[part]), targets[part]) for model, h in zip(models, states, strict=True)
        ]


def _log_probs(model: BlockwiseModel, states: Tensor) -> Tensor:
    """[n, vocab] for states [n, hidden], each a sequence of its own: the head looks at nothing beside it."""
    logits = _finite(model.logits(states[:, None]), model, "the output head")
    return torch.log_softmax(logits[:, 0], dim=-1)


def _finite(values: Tensor, model: BlockwiseModel, name: str) -> Tensor:
    """`values`, the output of `name`; NaN or infinity anywhere in it would make every figure meaningless."""
    if not torch.isfinite(values).all():
        raise QuantizeError(f"{model.checkpoint.name}: {name}: NaN or infinite activations; the model overflows")
    return values
