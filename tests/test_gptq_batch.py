"""Layers solved together get the codes that each gets alone."""

import numpy as np
import pytest
import torch
from correlated import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.hessian import LayerStats
from qtool import gptq_batch
from qtool.factor import factorize
from qtool.gptq import gptq_quantize, rtn_quantize
from qtool.gptq_batch import gptq_quantize_all
from qtool.recipe import QuantSpec

SPECS = {
    "as the default": {"group_size": 16},
    "as QMoE": {
        "bits": 2, "group_size": -1, "percdamp": 0.1, "act_order": False, "input_scales": False, "scale_search": False
    },
    "symmetric": {"group_size": 8, "symmetric": True, "bits": 3},
    "two-level statistics": {"group_size": 8, "stat_bits": 3, "stat_rows": 4},
    "ternary": {"format": "ternary", "bits": 2, "group_size": -1, "act_order": False, "scale_search": False},
    "ternary, searched": {"format": "ternary", "bits": 2, "group_size": -1},
    "nf4": {"format": "nf4", "group_size": 16},  # solved one by one
    "outliers": {"group_size": 16, "outliers": 0.02},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """As many as a layer gets among others: products of a few columns are rounded by their number."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def layers(n, out_features, in_features, seed=0):
    made = [make_layer(out_features, in_features, seed + i) for i in range(n)]
    return [weight for weight, _ in made], [stats for _, stats in made]


def assert_alike(weights, stats, spec):
    for weight, own, (solution, _) in zip(weights, stats, gptq_quantize_all(weights, stats, spec), strict=True):
        alone = gptq_quantize(weight, factorize(own, [weight], spec, "alone"), spec)
        np.testing.assert_array_equal(solution.layer.codes, alone.layer.codes)
        assert torch.equal(solution.decoded, alone.decoded)
        assert solution.layer.encoding == alone.layer.encoding
        assert solution.relative_error == pytest.approx(alone.relative_error, rel=1e-6)
        np.testing.assert_array_equal(solution.layer.dequantize(), solution.decoded.numpy())


@pytest.mark.parametrize("name", SPECS)
def test_the_codes_are_those_of_each_layer_alone(name):
    assert_alike(*layers(5, 24, 72), QuantSpec(**SPECS[name]))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 4), out=st.integers(1, 20), inputs=st.integers(8, 150), seed=st.integers(0, 99))
def test_the_codes_are_the_same_for_any_shape(n, out, inputs, seed):
    assert_alike(*layers(n, out, inputs, seed), QuantSpec(group_size=8))


@pytest.mark.parametrize("together", [1, 2])
def test_the_layers_are_taken_in_parts(monkeypatch, together):
    monkeypatch.setattr(gptq_batch, "MAX_ELEMENTS", together * 24 * 72)
    assert_alike(*layers(5, 24, 72), QuantSpec(group_size=16))


@pytest.mark.parametrize("sharing, n_factors", [(2, 3), (16, 2)])
def test_layers_that_read_one_input_share_its_factor(monkeypatch, sharing, n_factors):
    """Some of them, that is: more would wait for one core."""
    made = []

    def counted(*args):
        made.append(args)
        return factorize(*args)

    monkeypatch.setattr(gptq_batch, "factorize", counted)
    monkeypatch.setattr(gptq_batch, "SHARING", sharing)
    weights, stats = layers(4, 24, 72)
    shared = [stats[0], stats[2], stats[0], stats[0]]
    assert_alike(weights, shared, QuantSpec(**SPECS["as QMoE"]))
    assert len(made) == n_factors
    scaled = QuantSpec(group_size=8)  # by each one's own weight
    assert_alike(weights, shared, scaled)
    assert len(made) == n_factors + 4


def test_it_says_what_damping_each_took():
    weights, stats = layers(2, 8, 32)
    barely = torch.eye(32)
    barely[0, 1] = barely[1, 0] = 1.05  # indefinite: the first damping is not enough
    spec = QuantSpec(**SPECS["as QMoE"] | {"percdamp": 0.01})
    made = gptq_quantize_all(weights, [LayerStats(barely, 1, torch.ones(32)), stats[1]], spec)
    assert [percdamp for _, percdamp in made] == pytest.approx([0.1, 0.01])


def test_one_that_cannot_be_factored_is_rounded_and_the_others_are_not():
    weights, stats = layers(3, 8, 16)
    stats[1] = LayerStats(torch.full((16, 16), -1.0) - torch.eye(16), 1, torch.ones(16))
    spec = QuantSpec(group_size=8)
    solved = list(gptq_quantize_all(weights, stats, spec))
    assert [percdamp is None for _, percdamp in solved] == [False, True, False]
    np.testing.assert_array_equal(solved[1][0].layer.codes, rtn_quantize(weights[1], spec).layer.codes)
    for index in (0, 2):
        alone = gptq_quantize(weights[index], factorize(stats[index], [weights[index]], spec, "alone"), spec)
        np.testing.assert_array_equal(solved[index][0].layer.codes, alone.layer.codes)
