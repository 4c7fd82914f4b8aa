"""Perplexity of a model or file, and how far its predictions are from a baseline's.

The protocol is the GPTQ paper's: the text is tokenized once and cut
into windows side by side; the tail is dropped; the mean negative log likelihood is taken over every
predicted token. Blocks are run one at a time over all windows, so each weight is read and decoded once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.corpus import evaluation_windows, read_text, tokenize
from qtool.checkpoint import Checkpoint
from qtool.errors import ConfigError, QuantizeError
from qtool.model import BlockwiseModel
from qtool.numerics import exact_float32
from qtool.states import windows_per_batch

DEFAULT_SEQ_LEN = 2048
LOGITS_AT_A_TIME = 1 << 23  # 32 MB as float32: a vocabulary is wide, and two models are compared


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """Figures of one evaluation. The baseline's are None without one; KL is in nats, from baseline to model."""

    perplexity: float
    tokens: int  # predicted tokens: windows * (seq_len - 1)
    windows: int
    seq_len: int
    data: str
    data_sha256: str
    seconds: float
    baseline_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    same_top: float | None = None  # share of positions where both models' most likely token is the same

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def evaluate_perplexity(
    checkpoint: Checkpoint,
    *,
    data: str,
    seq_len: int | None = None,
    max_windows: int | None = None,
    baseline: Checkpoint | None = None,
    text_field: str = "text",
) -> PerplexityResult:
    """Perplexity of `checkpoint` on the text `data`, with `baseline` compared token by token."""
    started = time.perf_counter()
    models = [BlockwiseModel(c) for c in (checkpoint, baseline) if c is not None]
    tokenizer = checkpoint.tokenizer()
    text = read_text(data, split="test", text_field=text_field)
    tokens = tokenize(text, lambda joined: list(tokenizer(joined, verbose=False).input_ids))
    length = _window_length(models, seq_len)
    ids = torch.from_numpy(evaluation_windows(tokens, length, max_windows, source=data).copy())
    for model in models:
        model.check_tokens(ids)
    with exact_float32():
        figures = _score(models, ids)
    return PerplexityResult(
        **figures,
        tokens=ids.shape[0] * (length - 1),
        windows=ids.shape[0],
        seq_len=length,
        data=text.name,
        data_sha256=text.sha256,
        seconds=time.perf_counter() - started,
    )


def _window_length(models: list[BlockwiseModel], seq_len: int | None) -> int:
    if len({model.vocab_size for model in models}) > 1:
        sizes = " and ".join(str(model.vocab_size) for model in models)
        raise ConfigError(f"model and baseline have vocabularies of {sizes} tokens: not the same model")
    longest = min((m.max_seq_len for m in models if m.max_seq_len), default=None)
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    if seq_len < 2 or (longest is not None and seq_len > longest):
        most = "any length" if longest is None else f"{longest}, the context the model was built for"
        raise ConfigError(f"--seq-len {seq_len}: must be 2 to {most}")
    return seq_len


def _score(models: list[BlockwiseModel], ids: Tensor) -> dict[str, float]:
    batches = ids.split(windows_per_batch(ids.shape[1]))
    total = sum(len(model.blocks) for model in models) + len(batches)
    scores: list[dict[str, Tensor]] = []
    with tqdm(total=total, desc="evaluate", unit="step", disable=None) as bar, ExitStack() as stack:
        hidden = [_run_blocks(model, batches, bar) for model in models]
        for model in models:
            stack.enter_context(model.outside(head=True))
        for index, batch in enumerate(batches):
            for span in _spans(batch, models[0].vocab_size):
                logs = [_log_probs(m, h[index][:, span]) for m, h in zip(models, hidden, strict=True)]
                scores.append(_compare(logs, batch[:, span.start + 1 : span.stop + 1]))
            bar.update()
    columns = {name: torch.cat([score[name] for score in scores]).double().numpy() for name in scores[0]}
    figures = {"perplexity": float(np.exp(columns["nll"].mean()))}
    if len(models) == 2:
        figures["baseline_perplexity"] = float(np.exp(columns["baseline_nll"].mean()))
        figures["kl_mean"] = float(columns["kl"].mean())
        figures["kl_p99"] = float(np.percentile(columns["kl"], 99))
        figures["same_top"] = float(columns["same_top"].mean())
    return figures


def _run_blocks(model: BlockwiseModel, batches: tuple[Tensor, ...], bar: Any) -> list[Tensor]:
    """The last block's output for every batch of ids."""
    with model.outside(head=False):
        hidden = [model.embed(ids) for ids in batches]
    for index in range(len(model.blocks)):
        with model.block(index):
            hidden = [_finite(model.run(index, states), model, model.block_name(index)) for states in hidden]
        bar.update()
    return hidden


def _finite(values: Tensor, model: BlockwiseModel, name: str) -> Tensor:
    """`values`, the output of `name`; NaN or infinity anywhere in it would make every figure meaningless."""
    if not torch.isfinite(values).all():
        raise QuantizeError(f"{model.checkpoint.name}: {name}: NaN or infinite activations; the model overflows")
    return values


def _spans(batch: Tensor, vocab_size: int) -> Iterator[slice]:
    """The predicting positions (all but the last) in stretches whose logits fit the budget."""
    step = max(1, LOGITS_AT_A_TIME // (vocab_size * batch.shape[0]))
    last = batch.shape[1] - 1
    for start in range(0, last, step):
        yield slice(start, min(start + step, last))


def _log_probs(model: BlockwiseModel, hidden: Tensor) -> Tensor:
    return torch.log_softmax(_finite(model.logits(hidden), model, "the output head"), dim=-1)  # [batch, span, vocab]


def _compare(logs: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Per predicted token, flat: the model's score, and with a baseline its score, the divergence and agreement."""

    def nll(log: Tensor) -> Tensor:
        return -log.gather(2, targets[:, :, None]).flatten()

    if len(logs) == 1:
        return {"nll": nll(logs[0])}
    model, base = logs
    return {
        "nll": nll(model),
        "baseline_nll": nll(base),
        "kl": (base.exp() * (base - model)).sum(2).flatten(),
        "same_top": (model.argmax(2) == base.argmax(2)).flatten(),
    }
