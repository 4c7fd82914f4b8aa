"""The compiled column loop against `Grid.round_block`, bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.columns import STRIPE, CompiledGrid
from qtool.grid import Columns, UniformGrid
from qtool.ternary import TernaryGrid

N_GROUPS = 3


def scales_of(shape, generator):
    return (0.1 + torch.rand(shape, generator=generator)).half().float()


def int_grid(n_rows, generator):
    zeros = torch.randint(0, 8, (N_GROUPS, n_rows), generator=generator).float()
    return UniformGrid(scales_of((N_GROUPS, n_rows), generator), zeros, 3)


def two_level_grid(n_rows, generator):
    """Zeros that are no integers, and scales that were rounded down to zero."""
    scales = scales_of((N_GROUPS, n_rows), generator)
    scales[0, ::3] = 0
    return UniformGrid(scales, 7 * torch.rand(N_GROUPS, n_rows, generator=generator), 3)


def ternary_grid(n_rows, generator):
    low, high = (scales_of((1, n_rows), generator).expand(N_GROUPS, -1) for _ in range(2))
    return TernaryGrid(-low, high)


GRIDS = {"int": int_grid, "two-level": two_level_grid, "ternary": ternary_grid}


def rounded(grid, free, shares, groups, own, limits=None):
    """All that is made of the columns `own`; what is written of others stays zero."""
    columns = Columns.of(free.clone(), shares, groups)
    columns.lost.mul_(0.5)  # by now, columns have made up for others
    for written in (columns.codes, columns.decoded):
        written.zero_()
    grid.round_block(columns, own, limits)
    return columns.free, columns.lost, columns.codes, columns.decoded


def assert_same_bits(make, n_columns, n_rows, limit, seed):
    """Of a block between others, which it leaves as they are."""
    generator = torch.Generator().manual_seed(seed)
    grid, n_all = make(n_rows, generator), n_columns + 9
    own = slice(5, 5 + n_columns)
    free = torch.randn(n_all, n_rows, generator=generator)
    shares = torch.rand(n_all, n_all, generator=generator).sub_(0.5).triu_(1) + torch.eye(n_all)
    groups = torch.randint(0, N_GROUPS, (n_all,), generator=generator)
    limits = None if limit is None else limit * (0.5 + torch.rand(n_columns, generator=generator))
    found = rounded(CompiledGrid(grid), free, shares, groups, own, limits)
    expected = rounded(grid, free, shares, groups, own, limits)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy().view(np.uint8), other.numpy().view(np.uint8))
    others = np.delete(np.arange(n_all), own)
    for one, before in zip(found, (free, 0.5 * free, 0, 0), strict=True):
        np.testing.assert_array_equal(one[others], before[others] if torch.is_tensor(before) else before)


@pytest.mark.parametrize("limit", [None, 0.3])
@pytest.mark.parametrize("kind", GRIDS)
def test_bits_are_those_of_the_reference(kind, limit):
    assert_same_bits(GRIDS[kind], 64, 2 * STRIPE + 7, limit, seed=0)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(GRIDS)),
    n_columns=st.integers(1, 64),
    n_rows=st.integers(1, 2 * STRIPE + 9),
    limit=st.sampled_from([None, 0.1, 1.0]),
    seed=st.integers(0, 999),
)
def test_bits_are_the_same_for_any_shape(kind, n_columns, n_rows, limit, seed):
    assert_same_bits(GRIDS[kind], n_columns, n_rows, limit, seed)


def test_codes_by_hand():
    """Steps of 1 from -1 to 2, halves to the even one; the last column takes up half of what the first lost."""
    grid = CompiledGrid(UniformGrid(torch.ones(1, 4), torch.ones(1, 4), 2))
    weight = torch.tensor([[0.5, 1.5, -9.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    columns = Columns.of(weight, torch.tensor([[1.0, -0.5], [0.0, 1.0]]), torch.zeros(2, dtype=torch.int64))
    grid.round_block(columns, slice(0, 2))
    assert columns.codes.tolist() == [[2, 2, 0, 3], [1, 1, 3, 0]]
    assert columns.decoded.tolist() == [[1.0, 1.0, -1.0, 2.0], [0.0, 0.0, 2.0, -1.0]]
    assert columns.lost.tolist() == [[-0.5, 0.5, -8.0, 7.0], [0.0, 0.0, -2.0, 1.0]]
    assert columns.free[1].tolist() == [0.25, -0.25, 4.0, -3.5]


def test_ternary_codes_by_hand():
    """What lies half way is zero."""
    grid = CompiledGrid(TernaryGrid(torch.full((1, 5), -2.0), torch.full((1, 5), 4.0)))
    free = torch.tensor([[-3.0, -1.0, 0.0, 2.0, 2.5]])
    _, _, codes, decoded = rounded(grid, free, torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), slice(0, 1))
    assert codes.tolist() == [[0, 1, 1, 1, 2]]
    assert decoded.tolist() == [[-2.0, 0.0, 0.0, 0.0, 4.0]]
