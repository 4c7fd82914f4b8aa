"""Error bars: by hand, and against the spread of many experiments."""

import numpy as np
import pytest
import torch

from qtool.figures import Estimate, Predictions, collected, divergence, mean, perplexity, token_scores


def test_mean_of_independent_values_by_hand():
    """Values 1, 2, 3, 6: the deviations' squares sum to 14; sqrt(14 / (4 * 3))."""
    estimate = mean(np.array([1.0, 2.0, 3.0, 6.0]), None)
    assert estimate.value == 3
    assert estimate.error == pytest.approx(np.sqrt(14 / 12))


def test_mean_of_stretches_by_hand():
    """The deviations -2, -1, 0, 3 in stretches of 1, 1 and 2 tokens sum to -2, -1 and 3."""
    estimate = mean(np.array([1.0, 2.0, 3.0, 6.0]), np.array([0, 1, 2, 2]))
    assert estimate.value == 3
    assert estimate.error == pytest.approx(np.sqrt(3 / 2 * (4 + 1 + 9)) / 4)


def test_stretches_of_one_token_are_tokens():
    values = np.random.default_rng(0).normal(size=50)
    assert mean(values, np.arange(50)).error == pytest.approx(mean(values, None).error)


def test_stretches_of_one_length_are_their_means():
    """The usual standard error of as many means."""
    values = np.random.default_rng(0).normal(size=(12, 7))
    means = values.mean(1)
    estimate = mean(values.ravel(), np.repeat(np.arange(12), 7))
    assert estimate.error == pytest.approx(means.std(ddof=1) / np.sqrt(12))


@pytest.mark.parametrize("stretches", [None, np.array([0])])
def test_one_value_has_no_error(stretches):
    assert mean(np.array([2.5]), stretches) == Estimate(2.5, None)
    assert perplexity(np.array([0.0]), stretches) == Estimate(1, None)


def test_perplexity_by_hand():
    estimate = perplexity(np.log([2.0, 8.0]), None)
    assert estimate.value == pytest.approx(4)
    assert estimate.error == pytest.approx(4 * np.log(2))  # sqrt((log2^2 + log2^2) / (2 * 1))


def test_a_share_has_the_error_of_a_share():
    same = np.array([1.0] * 30 + [0.0] * 10)
    assert mean(same, None).error == pytest.approx(np.sqrt(0.75 * 0.25 / 39))


def test_only_stretches_see_that_tokens_stray_together():
    """4000 experiments on 40 passages of 50 tokens, each passage as hard as it happens to be."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4000, 40, 50)) + rng.normal(size=(4000, 40, 1))
    spread = values.mean((1, 2)).std()
    stretches = np.repeat(np.arange(40), 50)
    over_windows = np.mean([mean(v.ravel(), stretches).error for v in values[:400]])
    over_tokens = np.mean([mean(v.ravel(), None).error for v in values[:400]])
    assert over_windows == pytest.approx(spread, rel=0.05)
    assert over_tokens < 0.25 * spread


def test_ratio_of_like_models_is_far_better_known_than_either():
    rng = np.random.default_rng(0)
    base = rng.exponential(3, size=2000)
    model = base + rng.normal(0.1, 0.05, size=2000)
    ratio = perplexity(model - base, None)
    assert ratio.value == pytest.approx(perplexity(model, None).value / perplexity(base, None).value)
    assert ratio.error < 0.02 * perplexity(base, None).error


def test_token_scores_by_hand():
    half, quarter = np.log(0.5), np.log(0.25)
    base = Predictions.of(torch.tensor([[half, quarter, quarter]] * 2), torch.tensor([0, 2]))
    model = Predictions.of(torch.tensor([[half, quarter, quarter], [quarter, half, quarter]]), torch.tensor([0, 2]))
    scores = token_scores(model, base)
    assert scores["nll"].tolist() == pytest.approx([-half, -quarter])
    assert scores["baseline_nll"].tolist() == pytest.approx([-half, -quarter])
    assert scores["kl"].tolist() == pytest.approx([0, 0.5 * np.log(2) - 0.25 * np.log(2)])
    assert scores["same_top"].tolist() == [True, False]
    assert token_scores(model).keys() == {"nll"}


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1, 1, 10, 100])
def test_divergence_is_as_good_as_in_float64(distance):
    """Of models so near that float32's plain sum is mostly rounding, and so far that its exponentials overflow."""
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 20_000, generator=rng)
    base = torch.log_softmax(logits, 1)
    model = torch.log_softmax(logits + distance * torch.randn(20, 20_000, generator=rng), 1)
    exact_base, exact_model = (torch.log_softmax(logs.double(), 1) for logs in (base, model))
    want = (exact_base.exp() * (exact_base - exact_model)).sum(1)
    got = divergence(base, model).double()
    assert got.numpy() == pytest.approx(want.numpy(), rel=1e-3)
    plain = (base.exp() * (base - model)).sum(1).double()
    assert distance > 1e-3 or plain.numpy() != pytest.approx(want.numpy(), rel=1e-2)


def test_divergence_from_itself_is_nothing():
    logs = torch.log_softmax(torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)), 1)
    assert divergence(logs, logs).tolist() == [0] * 5


def test_scores_are_collected_in_order():
    parts = [
        {"nll": torch.tensor([1.0, 2.0]), "same_top": torch.tensor([True, False])},
        {"nll": torch.tensor([3.0]), "same_top": torch.tensor([True])},
    ]
    columns = collected(iter(parts), 3)
    assert {name: values.tolist() for name, values in columns.items()} == {"nll": [1, 2, 3], "same_top": [1, 0, 1]}
    assert {values.dtype for values in columns.values()} == {np.dtype(np.float64)}
