"""From what models predict for single tokens to the figures of an evaluation, with their error bars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values: TypeAlias = npt.NDArray[np.float64]
Stretches: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one model predicts for n tokens.

    log_probs: [n, vocab] float32, nats.
    nll: [n] float32, minus the log-probability of the token that came.
    top: [n] int64, the most likely token.
    """

    log_probs: Tensor
    nll: Tensor
    top: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, targets: Tensor) -> Predictions:
        """Those of `log_probs` [n, vocab] for the tokens `targets` [n]."""
        return cls(log_probs, -log_probs.gather(1, targets[:, None])[:, 0], log_probs.argmax(1))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the scored tokens, or its exponential, and one standard error; None where it cannot be known."""

    value: float
    error: float | None

    def exp(self) -> Estimate:
        value = float(np.exp(self.value))
        return Estimate(value, None if self.error is None else value * self.error)


def token_scores(model: Predictions, base: Predictions | None = None) -> dict[str, Tensor]:
    """Per token: the model's score, and with a baseline its score, the divergence from it and the agreement.

    KL runs from the baseline to the model, in nats: what is lost by taking the model for the baseline.
    """
    if base is None:
        return {"nll": model.nll}
    return {
        "nll": model.nll,
        "baseline_nll": base.nll,
        "kl": divergence(base.log_probs, model.log_probs),
        "same_top": model.top == base.top,
    }


def divergence(base: Tensor, model: Tensor) -> Tensor:
    """[n] KL(base || model), nats, of log-probabilities [n, vocab].

    Summed as q - p + p log(p / q), whose terms are never negative. The plain sum of p log(p / q) is the same, as both
    sum to 1, but in float32 they do so only to 1e-6, which is as much as what two good models differ by.
    """
    p, d = base.exp(), base - model
    near, far = torch.expm1(-d).add_(d).mul_(p), model.exp().sub_(p).add_(p * d)
    return torch.where(d.abs() < 1, near, far).sum(1)  # near: q - p cancels; far: expm1 may overflow


def collected(parts: Iterable[dict[str, Tensor]], n_tokens: int) -> dict[str, Values]:
    """The scores of successive tokens, `n_tokens` in all, each name's in one array."""
    columns: dict[str, Values] = {}
    n_done = 0
    for part in parts:
        # All at once: a small array kept from each part would pin the heap between the large ones that come and go.
        columns = columns or {name: np.empty(n_tokens) for name in part}
        for name, values in part.items():
            columns[name][n_done : n_done + len(values)] = values.numpy()
        n_done += len(part["nll"])
    return columns


def mean(values: Values, stretches: Stretches | None) -> Estimate:
    """The mean of `values` [n] with its standard error.

    stretches: [n], which stretch of the text each token lies in. The deviations of a stretch are summed before they
    are squared, so that tokens which stray together count as one observation (standard errors clustered by stretch).
    None takes every token for independent, which is llama.cpp's formula: sqrt((mean(x^2) - mean(x)^2) / (n - 1)).
    """
    average = float(values.mean())
    deviations = values - average
    if stretches is not None:
        deviations = np.bincount(stretches, weights=deviations).astype(np.float64, copy=False)
    n = len(deviations)
    if n < 2:
        return Estimate(average, None)
    return Estimate(average, float(np.sqrt(n / (n - 1) * (deviations**2).sum()) / len(values)))


def perplexity(nll: Values, stretches: Stretches | None) -> Estimate:
    """exp of the mean of `nll` [n]. Of the differences of two models, it is the ratio of their perplexities, whose
    error is far smaller than either's: what makes the text hard is in both."""
    return mean(nll, stretches).exp()
