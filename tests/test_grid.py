"""The grid of a group: known answers by hand, then what must hold for every weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import grid
from qtool.grid import (
    SHRINK_STEPS,
    UniformGrid,
    _decoded,
    fit_uniform,
    full_range,
    group_slices,
    search_range,
    weighted_error,
)
from qtool.outliers import OutlierRule
from qtool.statistics import FP16_TINY


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(weight: torch.Tensor, grid: UniformGrid, group_size: int) -> torch.Tensor:
    groups = torch.arange(weight.shape[1]) // group_size
    return grid.quantize(weight.T, groups)[1].T


def test_asymmetric_by_hand():
    """-1 .. 2 in 2 bits: steps of 1, so that -1 is code 0 and zero is code 1."""
    weight = torch.tensor([[-1.0, 0.0, 0.9, 2.0]])
    grid = fit_uniform(weight, 4, 2, symmetric=False)
    assert grid.scales.tolist() == [[1.0]]
    assert grid.zeros.tolist() == [[1.0]]
    codes, decoded = grid.quantize(weight.T, torch.zeros(4, dtype=torch.long))
    assert codes.flatten().tolist() == [0, 1, 2, 3]
    assert decoded.flatten().tolist() == [-1, 0, 1, 2]


def test_symmetric_by_hand():
    """The range is ± the largest magnitude, zero is the middle code 2 of 4, and the top code is half a step short."""
    grid = fit_uniform(torch.tensor([[-1.5, 0.5]]), 2, 2, symmetric=True)
    assert grid.scales.tolist() == [[1.0]]
    assert grid.zeros.tolist() == [[2.0]]


def test_the_range_always_holds_zero():
    """All weights positive: the range starts at 0, so that a pruned weight stays exactly 0."""
    grid = fit_uniform(torch.tensor([[3.0, 6.0]]), 2, 2, symmetric=False)
    assert (grid.scales.item(), grid.zeros.item()) == (2.0, 0.0)


def test_a_group_of_zeros_decodes_to_zeros():
    weight = torch.zeros(2, 8)
    grid = fit_uniform(weight, 4, 3, symmetric=False)
    assert grid.scales.unique().tolist() == [FP16_TINY]
    assert rounded(weight, grid, 4).abs().max() == 0


def test_the_last_group_may_be_short():
    assert list(group_slices(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    weight = weights(3, 10)
    grid = fit_uniform(weight, 4, 8, symmetric=False)
    assert grid.scales.shape == (3, 3)
    alone = fit_uniform(weight[:, 8:], 2, 8, symmetric=False)
    assert torch.equal(grid.scales[2], alone.scales[0])


def test_scales_are_what_fp16_stores():
    grid = fit_uniform(weights(16, 64), 16, 4, symmetric=False, hessian=torch.eye(64))
    assert torch.equal(grid.scales, grid.scales.half().float())
    assert torch.equal(grid.zeros, grid.zeros.round())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 1000), st.integers(1, 40))
def test_rounding_is_off_by_half_a_step_at_most(bits, symmetric, seed, columns):
    weight = weights(4, columns, seed)
    grid = fit_uniform(weight, 16, bits, symmetric=symmetric)
    step = grid.scales[torch.arange(columns) // 16].T
    # The scale is rounded to fp16, so the outermost code may miss by max_code * 2**-11 steps more; a symmetric
    # grid's top code is half a step short of the largest weight, and zero's own rounding takes half a step.
    slack = 0.5 + 2**bits * 2.0**-11
    assert ((rounded(weight, grid, 16) - weight).abs() <= (1.0 + slack) * step + 1e-7).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_never_makes_the_weighted_error_larger(bits):
    weight, x = weights(32, 64), weights(256, 64, seed=1) * torch.linspace(0.1, 5, 64)
    hessian = x.T @ x / 256
    errors = []
    for metric in (None, hessian):
        grid = fit_uniform(weight, 64, bits, symmetric=False, hessian=metric)
        d = rounded(weight, grid, 64) - weight
        errors.append(((d @ hessian) * d).sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("together", [1, 200, 1 << 20])
def test_how_many_ranges_are_tried_together_changes_nothing(monkeypatch, together):
    weight, x = weights(5, 16), weights(40, 16, seed=1)
    metric = x.T @ x
    low, high = full_range(weight, symmetric=False)

    def cost(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return weighted_error(rows, _decoded(rows, a, b, 3, False), metric)

    shares = torch.linspace(1, 0.6, SHRINK_STEPS)
    costs = torch.stack([cost(weight, share * low, share * high) for share in shares])
    monkeypatch.setattr(grid, "TOGETHER", together)
    found = search_range(weight, low, high, cost, 0.6)
    best = shares[costs.argmin(0)]
    torch.testing.assert_close(found, (low * best, high * best), rtol=0, atol=0)
    assert len(best.unique()) > 1


def test_of_ranges_that_cost_the_same_the_widest_is_taken():
    weight = weights(4, 8)
    low, high = full_range(weight, symmetric=False)
    found = search_range(weight, low, high, lambda rows, a, b: torch.ones(len(rows)))
    torch.testing.assert_close(found, (low, high), rtol=0, atol=0)
    nothing = search_range(weight[:0], low[:0], high[:0], lambda rows, a, b: torch.ones(len(rows)))
    assert [len(values) for values in nothing] == [0, 0]


def test_a_weak_row_does_not_take_the_zeros_of_its_set():
    """Its scale is rounded to next to nothing, and what its zero would be then has no place in the set's range."""
    weight = weights(16, 16)
    alone = fit_uniform(weight[2:], 16, 3, symmetric=False, stat_bits=3)
    weight[0] *= 1e-4
    weight[1] *= 0.05
    grid = fit_uniform(weight, 16, 3, symmetric=False, stat_bits=3)
    assert grid.zeros.max() <= 7 + 1e-3
    error = (rounded(weight, grid, 16)[2:] - weight[2:]).square().sum()
    assert error < 3 * (rounded(weight[2:], alone, 16) - weight[2:]).square().sum()


def test_a_symmetric_grid_is_the_one_that_outliers_are_left_out_of():
    """All negative but one: the range that is really used reaches as far up as down."""
    weight = torch.tensor([[-1.0, -1.0, -0.9, -0.8, -0.7, -0.6, -0.5, 0.1]])
    rule = OutlierRule(0.05, torch.ones(8))
    plain = fit_uniform(weight, 8, 4, symmetric=True)
    assert torch.equal(fit_uniform(weight, 8, 4, symmetric=True, rule=rule).scales, plain.scales)
