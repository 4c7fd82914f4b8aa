"""SpQR's outliers: leaving one out against refitting every time, the threshold by hand, and what the solver keeps."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from correlated import make_layer, output_error
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.layer import dequantize
from formats.section import pack
from qtool.factor import factorize
from qtool.gptq import Solution, _quantize_rows, _round_columns, _solve, fit_layer, gptq_quantize, groups_of
from qtool.grid import _decoded
from qtool.outliers import (
    FP16_MAX,
    MAX_THRESHOLD,
    MIN_THRESHOLD,
    OutlierList,
    OutlierRule,
    kept_values,
    leave_one_out,
    relative_threshold,
    threshold_of_rate,
)
from qtool.recipe import QuantSpec

PLAIN = QuantSpec(bits=3, group_size=16)


def solve(weight: torch.Tensor, stats, spec: QuantSpec) -> Solution:
    return gptq_quantize(weight, factorize(stats, [weight], spec, "layer"), spec)


# ---- leave one out


def group_error(weights: list[float], cost: list[float], bits: int) -> float:
    """What the errors of a group cost on a grid from its smallest to its largest weight, zero included."""
    low, high = min(*weights, 0.0), max(*weights, 0.0)
    scale = max(float(np.float16((high - low) / (2**bits - 1))), 2.0**-24)
    zero = min(max(round(-low / scale), 0), 2**bits - 1)
    codes = [min(max(round(w / scale + zero), 0), 2**bits - 1) for w in weights]
    return sum(c * (scale * (code - zero) - w) ** 2 for w, c, code in zip(weights, cost, codes, strict=True))


def leave_one_out_slowly(weights: list[float], cost: list[float], bits: int) -> list[float]:
    """Refits the group without each of its weights."""
    whole = group_error(weights, cost, bits)
    rest = [group_error(weights[:i] + weights[i + 1 :], cost[:i] + cost[i + 1 :], bits) for i in range(len(weights))]
    return [whole - left for left in rest]


# Multiples of 1/8 and powers of two: every sum below is exact in float64, so the comparison is, too.
groups = st.integers(2, 16).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(-64, 64), min_size=n, max_size=n), min_size=1, max_size=4),
        st.lists(st.integers(-3, 3), min_size=n, max_size=n),
    )
)


@settings(max_examples=150, deadline=None)
@given(groups, st.integers(2, 4))
def test_leave_one_out_is_refitting_without_every_weight(drawn, bits):
    weight = torch.tensor(drawn[0], dtype=torch.float64) / 8
    cost = 2.0 ** torch.tensor(drawn[1], dtype=torch.float64)
    gain = leave_one_out(weight, cost, lambda w, low, high: _decoded(w, low, high, bits, False))
    slow = [leave_one_out_slowly(row, cost.tolist(), bits) for row in weight.tolist()]
    assert gain.tolist() == slow


def test_leave_one_out_by_hand():
    """2 bits from 0 to 30: steps of 10. Without 30 the other three are exact: all that they lost is gained."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 30.0]])
    gain = leave_one_out(weight, torch.ones(4), lambda w, low, high: _decoded(w, low, high, 2, False))
    assert gain.tolist() == [[1.0, 4.0, 9.0, 14.0]]
    rule = OutlierRule(10.0, torch.ones(4))
    rest = rule.without_outliers(weight, slice(0, 4), lambda w, low, high: _decoded(w, low, high, 2, False))
    assert rest.tolist() == [[1.0, 2.0, 3.0, 2.0]]  # the outlier has become the mean of the others


def test_a_weight_left_out_has_no_error_where_no_level_is_zero():
    """As of fitted levels: everything is off by 1, so leaving out any one weight gains just that."""
    gain = leave_one_out(torch.tensor([[1.0, -2.0, 3.0]]), torch.ones(3), lambda w, low, high: w + 1)
    assert gain.tolist() == [[1.0, 1.0, 1.0]]


def test_a_group_of_outliers_alone_becomes_zeros():
    rule = OutlierRule(-1.0, torch.ones(2))
    rest = rule.without_outliers(
        torch.tensor([[3.0, 5.0]]), slice(0, 2), lambda w, low, high: _decoded(w, low, high, 2, False)
    )
    assert rest.tolist() == [[0.0, 0.0]]


def test_costs_are_those_of_the_groups_columns():
    """The second group's columns cost nothing, so nothing is gained there."""
    rule = OutlierRule(0.5, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    weight = torch.tensor([[1.0, 2.0, 3.0, 30.0]])
    for columns, changes in ((slice(0, 4), True), (slice(4, 8), False)):
        rest = rule.without_outliers(weight, columns, lambda w, low, high: _decoded(w, low, high, 2, False))
        assert torch.equal(rest, weight) != changes


# ---- thresholds


def test_the_unit_of_the_threshold_by_hand():
    """Variances 1 and 4, costs 3 and 0.5: the mean of 3 and 2."""
    weight = torch.tensor([[0.0, 2.0], [2.0, 6.0]])
    assert relative_threshold(weight, torch.tensor([3.0, 0.5])) == 2.5


def test_the_unit_is_spqrs_formula():
    """mean over columns of Var(W[:, j]) / U_jj², with U from numpy's own inverse."""
    weight, stats = make_layer()
    spec = dataclasses.replace(PLAIN, input_scales=False, act_order=False)
    factor = factorize(stats, [weight], spec, "layer")
    inverse = np.linalg.inv(factor.damped.double().numpy())
    u = np.linalg.cholesky(inverse).T  # H⁻¹ = UᵀU
    want = (weight.double().numpy().var(0) / np.diag(u) ** 2).mean()
    assert relative_threshold(weight, factor.cost) == pytest.approx(want, rel=1e-4)


def test_the_unit_is_that_of_the_weights_as_they_are_stored():
    """Costs are those of columns that the input scales have been divided out of."""
    weight, stats = make_layer()
    spec = dataclasses.replace(PLAIN, outlier_threshold=0.3)
    factor = factorize(stats, [weight], spec, "layer")
    _, rule = fit_layer(weight, factor, spec)
    want = 0.3 * relative_threshold(weight / factor.input_scales, factor.cost)
    assert rule.threshold == pytest.approx(want, rel=1e-5)


def test_what_is_kept_by_hand():
    """Threshold 4, pivot 4: an error costs more than 4 when it is above 1."""
    limits = OutlierRule(4.0, torch.ones(1)).limits(torch.tensor([4.0]))
    assert limits.tolist() == [1.0]
    kept = kept_values(torch.tensor([[0.9, 1.0, 1.1, -3.0, 1e9]]), limits)
    assert kept.tolist() == [[0.0, 0.0, np.float16(1.1), -3.0, FP16_MAX]]


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1, 100), st.floats(0.01, 10), st.integers(0, 1000))
def test_a_higher_threshold_never_keeps_more(threshold, factor, pivot, seed):
    residual, pivots = torch.randn(1, 200, generator=torch.Generator().manual_seed(seed)), torch.tensor([pivot])
    rules = [OutlierRule(t, torch.ones(1)) for t in (threshold, factor * threshold)]
    low, high = (kept_values(residual, rule.limits(pivots)) != 0 for rule in rules)
    assert (low | ~high).all()


@pytest.mark.parametrize("rate", [0.999, 0.5, 0.05, 1e-3, 1e-5])
def test_a_rate_gives_the_least_threshold_that_meets_it(rate):
    """The share of an exponential distribution above t is exp(-t). Few solves find it."""
    asked = []

    def share(threshold):
        asked.append(threshold)
        return math.exp(-threshold)

    found, least = threshold_of_rate(rate, share), -math.log(rate)
    assert least <= found
    assert found <= 1.05 * least or share(found) >= 0.94 * rate
    assert len(set(asked)) <= 9


def test_the_search_of_a_threshold_ends_where_no_threshold_meets_the_rate_and_where_every_one_does():
    assert threshold_of_rate(0.01, lambda t: 1.0) >= MAX_THRESHOLD
    assert 0 < threshold_of_rate(0.01, lambda t: 0.0) <= 2 * MIN_THRESHOLD


def test_a_layer_without_variance_has_no_outliers():
    """A single row, as of a gate: SpQR's unit would be zero, and every weight beyond it."""
    weight, stats = make_layer(rows=1)
    for options in ({"outlier_threshold": 0.2}, {"outliers": 0.01}):
        spec = dataclasses.replace(PLAIN, **options)
        assert relative_threshold(weight, torch.ones(40)) == math.inf
        assert solve(weight, stats, spec).layer.outliers is None


# ---- the list


def test_outliers_lie_row_by_row_however_they_were_found():
    found = OutlierList()
    found.add(0, 2, torch.tensor([0.0, 5.0]))
    found.add(0, 0, torch.tensor([0.0, 3.0]))
    found.add(2, 1, torch.tensor([7.0]))
    assert len(found) == 3
    sparse = found.sparse((3, 4))
    assert sparse.row_ptr.tolist() == [0, 0, 2, 3]
    assert sparse.columns.tolist() == [0, 2, 1]
    assert sparse.values.tolist() == [3.0, 5.0, 7.0]
    assert (sparse.columns.dtype, found.sparse((3, 65537)).columns.dtype) == (np.uint16, np.uint32)


def test_no_outliers_are_none():
    found = OutlierList()
    found.add(0, 0, torch.zeros(3))
    assert found.sparse((3, 1)) is None


# ---- in the solver


@pytest.fixture(scope="module")
def layer():
    """A layer [96, 128] of which one weight in 50 is ten times as large."""
    weight, stats = make_layer(96, 128, seed=2)
    large = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.02
    return torch.where(large, 10 * weight, weight), stats


def test_what_is_kept_is_exact_to_fp16_beside_its_code(layer):
    """Nothing has been added yet to the column that is rounded first."""
    weight, stats = layer
    spec = dataclasses.replace(PLAIN, outliers=0.02, input_scales=False)
    factor = factorize(stats, [weight], spec, "layer")
    solved, column = gptq_quantize(weight, factor, spec), factor.perm[0].item()
    outliers = solved.layer.outliers
    off = (solved.decoded - weight)[:, column].abs().numpy()
    kept = np.zeros(96, np.float32)
    rows = np.repeat(np.arange(96), np.diff(outliers.row_ptr.astype(int)))[outliers.columns == column]
    kept[rows] = np.abs(outliers.values[outliers.columns == column])
    assert len(rows) > 1
    assert (off[rows] <= 2.0**-11 * kept[rows]).all()
    assert np.delete(off, rows).max() <= kept[rows].min()


def test_a_rule_that_keeps_nothing_gives_the_bytes_of_plain_gptq(layer):
    """Two loops solve a layer, with a rule and without: they have to agree."""
    weight, stats = layer
    factor = factorize(stats, [weight], PLAIN, "layer")
    grid, _ = fit_layer(weight, factor, PLAIN)
    groups = torch.arange(128) // 16
    stored = weight / factor.input_scales
    kept = OutlierList()
    plain = _quantize_rows(stored, grid, groups, factor, None, lambda column, values: None)
    ruled = _quantize_rows(
        stored, grid, groups, factor, OutlierRule(math.inf, factor.cost), lambda c, v: kept.add(0, c, v)
    )
    assert len(kept) == 0
    assert torch.equal(ruled.codes, plain.codes)
    assert torch.equal(ruled.decoded, plain.decoded)


def test_a_threshold_out_of_reach_gives_the_bytes_of_plain_gptq(layer):
    weight, stats = layer
    spqr = dataclasses.replace(PLAIN, stat_bits=3)
    without = solve(weight, stats, dataclasses.replace(spqr, outlier_threshold=1e9))
    assert bytes(pack(without.layer)) == bytes(pack(solve(weight, stats, spqr).layer))


@pytest.mark.parametrize("number_format", ["int", "nf4", "fitted"])
@pytest.mark.parametrize("rate", [0.005, 0.03, 0.1])
def test_a_rate_is_met_from_below(layer, rate, number_format):
    """The layer has fewer rows than are looked at to learn the threshold, so the share is known exactly."""
    weight, stats = layer
    spec = QuantSpec(bits=4, format=number_format, group_size=16, outliers=rate)
    share = len(solve(weight, stats, spec).layer.outliers) / weight.numel()
    assert 0.8 * rate <= share <= rate


def test_a_rate_is_near_where_some_rows_speak_for_all():
    weight, stats = make_layer(512, 64, seed=4)
    share = len(solve(weight, stats, dataclasses.replace(PLAIN, outliers=0.02)).layer.outliers) / weight.numel()
    assert 0.7 * 0.02 < share < 1.3 * 0.02


def test_higher_thresholds_keep_fewer(layer):
    weight, stats = layer
    counts = []
    for threshold in (0.05, 0.2, 0.8, 3.2):
        outliers = solve(weight, stats, dataclasses.replace(PLAIN, outlier_threshold=threshold)).layer.outliers
        counts.append(len(outliers) if outliers else 0)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[-1] > 0


@pytest.mark.parametrize("number_format", ["int", "nf4", "trellis"])
def test_outliers_cut_the_output_error_at_equal_grids(layer, number_format):
    weight, stats = layer
    spec = QuantSpec(bits=4, format=number_format, group_size=32, memory=3)
    errors = [
        output_error(weight, solve(weight, stats, dataclasses.replace(spec, outliers=rate)).decoded, stats.hessian)
        for rate in (0.0, 0.01, 0.05)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"format": "nf4", "bits": 4}, {"format": "trellis", "bits": 2, "memory": 3}], ids=str
)
def test_later_columns_make_up_for_what_outliers_became(options, act_order):
    """With d what each weight lost, d M is the error of each when it was rounded: none of what is kept, and of others
    none beyond the limit. M from numpy's factor, in float64."""
    weight, stats = make_layer(70, 100)
    spec = dataclasses.replace(PLAIN, input_scales=False, act_order=act_order, **options)
    factor = factorize(stats, [weight], spec, "layer")
    rule = OutlierRule(0.05 * factor.cost.mean().item(), factor.cost)
    kept = torch.zeros_like(weight)
    solved = _round_columns(
        weight,
        factor,
        fit_layer(weight, factor, spec)[0],
        groups_of(100, spec),
        rule,
        lambda column, values: kept[:, column].copy_(values),
        block_size=16,
    )
    perm, is_kept = factor.perm, (kept != 0)[:, factor.perm].numpy()
    reverse = factor.damped.double().numpy()[perm][:, perm][::-1, ::-1]
    upper = np.linalg.cholesky(reverse)[::-1, ::-1]
    errors = (weight - solved.decoded.T - kept).double().numpy()[:, perm] @ (upper / upper.diagonal())
    limits = np.broadcast_to(math.sqrt(rule.threshold) / upper.diagonal(), errors.shape)
    assert 0.005 < is_kept.mean() < 0.5
    assert (abs(errors) <= limits * (1 + 1e-3))[~is_kept].all()
    # Beyond a block, an outlier became what was free, and not what fp16 holds of that.
    assert (abs(errors) <= 2.0**-10 * (limits + abs(kept[:, perm].numpy())))[is_kept].all()


def test_rows_in_stripes_keep_the_same_outliers(layer, monkeypatch):
    weight, stats = layer
    spec = dataclasses.replace(PLAIN, outliers=0.02)
    whole = solve(weight, stats, spec)
    monkeypatch.setattr("qtool.gptq.MAX_ELEMENTS", 128 * 10)
    stripes = solve(weight, stats, spec)
    assert bytes(pack(stripes.layer)) == bytes(pack(whole.layer))
    assert np.array_equal(dequantize(stripes.layer), stripes.decoded.numpy())


def test_spqr_beats_gptq_at_equal_bytes():
    """The paper's claim, on a layer that has outliers: one weight in 100 is ten times as large."""
    weight, stats = make_layer(256, 256, seed=2)
    large = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.01
    weight = torch.where(large, 10 * weight, weight)
    spqr = QuantSpec(bits=3, group_size=16, stat_bits=3, outliers=0.01)
    gptq = QuantSpec(bits=4, group_size=128)
    few, many = solve(weight, stats, spqr), solve(weight, stats, gptq)
    assert len(pack(few.layer)) < len(pack(many.layer))
    assert few.relative_error < 0.7 * many.relative_error


def test_what_is_dropped_is_made_up_for_by_later_columns():
    weight, stats = make_layer(64, 40)
    spec = dataclasses.replace(PLAIN, outlier_threshold=0.05, outliers=0.02)
    factor = factorize(stats, [weight], spec, "layer")
    grid, rule = fit_layer(weight, factor, spec)
    cut = _solve(weight, grid, spec, factor, rule, (factor.damped, factor.damping), is_last=True)
    again = gptq_quantize(weight, factor, spec)
    at_most = round(0.02 * weight.numel())
    assert len(cut.layer.outliers.values) == at_most
    assert 0.9 * at_most <= len(again.layer.outliers.values) <= at_most
    assert again.relative_error < 0.8 * cut.relative_error
