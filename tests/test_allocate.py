"""Bits over layers: the knapsack against all there is to choose from."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qtool.allocate
from qtool.allocate import Allocation, Candidate, allocate

UNIT = 256
A_CANDIDATE = st.builds(
    Candidate,
    n_bytes=st.integers(1, 12).map(lambda units: UNIT * units),
    loss=st.floats(0, 100, allow_subnormal=False),
)
LAYERS = st.lists(st.lists(A_CANDIDATE, min_size=1, max_size=4), min_size=1, max_size=5)
BUDGET = st.integers(0, 40 * UNIT)


def least_loss(layers, budget) -> float | None:
    """By trying every choice."""
    choices = [c for c in itertools.product(*layers) if sum(one.n_bytes for one in c) <= budget]
    return min((sum(one.loss for one in c) for c in choices), default=None)


def check_sums(layers, budget, found: Allocation) -> None:
    """What is said of a choice is so, and it fits."""
    chosen = [layer[i] for layer, i in zip(layers, found.choice, strict=True)]
    assert found.n_bytes == sum(c.n_bytes for c in chosen) <= budget
    assert found.loss == pytest.approx(sum(c.loss for c in chosen))


@given(LAYERS, BUDGET)
def test_the_exact_method_finds_the_least_loss(layers, budget):
    found, least = allocate(layers, budget), least_loss(layers, budget)
    if least is None:
        assert found is None
        return
    check_sums(layers, budget, found)
    assert found.loss == pytest.approx(least, abs=1e-9) and found.gap == 0


@given(LAYERS, BUDGET)
def test_the_relaxed_method_states_how_far_it_may_be_off(layers, budget):
    least = least_loss(layers, budget)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(qtool.allocate, "MAX_CELLS", -1)  # never the exact one
        found = allocate(layers, budget)
    if least is None:
        assert found is None
        return
    check_sums(layers, budget, found)
    assert found.loss >= least - 1e-9
    assert found.loss * (1 - found.gap) <= least + 1e-9  # the bound that the gap stands for


@given(LAYERS, BUDGET)
def test_both_agree_whether_there_is_a_choice_at_all(layers, budget):
    least = sum(min(c.n_bytes for c in layer) for layer in layers)
    assert (allocate(layers, budget) is None) == (budget < least)


def test_the_budget_may_be_met_to_the_byte():
    layers = [[Candidate(256, 3.0), Candidate(512, 1.0)], [Candidate(256, 2.0), Candidate(768, 0.5)]]
    assert allocate(layers, 512).choice == (0, 0)
    assert allocate(layers, 767).choice == (0, 0)
    assert allocate(layers, 768).choice == (1, 0)
    assert allocate(layers, 1279).choice == (1, 0)
    assert allocate(layers, 1280).choice == (1, 1)


def test_a_smaller_candidate_that_loses_less_is_taken_whatever_the_order():
    assert allocate([[Candidate(512, 2.0), Candidate(256, 1.0)]], 512).choice == (1,)


def model_of(n_layers, seed=0):
    """Layers as a large model has them: losses that fall by 4 with every bit."""
    rng = random.Random(seed)
    shapes = [(rng.choice([16, 64, 256]), rng.lognormvariate(0, 1)) for _ in range(n_layers)]
    return [[Candidate(UNIT * size * bits, scale / 4**bits) for bits in range(1, 7)] for size, scale in shapes]


def test_thirty_thousand_layers():
    """A mixture of many experts: the dynamic program would take a table of gigabytes."""
    layers = model_of(30_000)
    for bits in (1.5, 3.3, 5.9):
        budget = int(bits / 6 * sum(layer[-1].n_bytes for layer in layers))
        found = allocate(layers, budget)
        check_sums(layers, budget, found)
        assert 0 <= found.gap < 1e-3
        assert found.n_bytes > 0.999 * budget


@pytest.mark.parametrize("bits", [1.2, 2.5, 4.0, 5.5])
def test_the_two_methods_nearly_agree_on_a_model(monkeypatch, bits):
    layers = model_of(60)
    budget = int(bits / 6 * sum(layer[-1].n_bytes for layer in layers))
    exact = allocate(layers, budget)
    monkeypatch.setattr(qtool.allocate, "MAX_CELLS", -1)
    relaxed = allocate(layers, budget)
    assert exact.loss <= relaxed.loss <= exact.loss * 1.05
    assert relaxed.loss * (1 - relaxed.gap) <= exact.loss * (1 + 1e-9)
