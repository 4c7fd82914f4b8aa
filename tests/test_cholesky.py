"""The factor against its definition, the inverse's diagonal against numpy's, and both against two by two by hand."""

import numpy as np
import pytest
import torch

from qtool.cholesky import BLOCK_SIZE, inverse_diagonal, upper_factor


def positive_definite(n, seed=0):
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / n + 0.01 * torch.eye(n, dtype=torch.float64)


def test_two_by_two_by_hand():
    """[[2, 2], [2, 4]] is RRᵀ with R = [[1, 1], [0, 2]]; its inverse is [[1, -1/2], [-1/2, 1/2]]."""
    matrix = torch.tensor([[2.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    np.testing.assert_allclose(upper_factor(matrix.clone()), [[1, 1], [0, 2]], rtol=1e-15)
    np.testing.assert_allclose(inverse_diagonal(matrix), [1, 0.5], rtol=1e-15)


SIZES = [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 300]


@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_upper_factor(n):
    matrix = positive_definite(n)
    before = matrix.numpy().copy()
    found = upper_factor(matrix)
    assert found is matrix  # no other of its size is made
    np.testing.assert_array_equal(found, np.triu(found))
    assert (found.diagonal() > 0).all()
    np.testing.assert_allclose(found @ found.T, before, atol=1e-13 * abs(before).max())


@pytest.mark.parametrize("n", SIZES)
def test_it_is_the_diagonal_of_the_inverse(n):
    matrix = positive_definite(n)
    expected = np.linalg.inv(matrix.numpy()).diagonal()
    np.testing.assert_allclose(inverse_diagonal(matrix), expected, rtol=1e-9)


@pytest.mark.parametrize("at", [0, BLOCK_SIZE, 299])
def test_what_is_not_positive_definite_is_refused_wherever_it_shows(at):
    matrix = positive_definite(300)
    matrix[at, at] = -1
    for function in (upper_factor, inverse_diagonal):
        with pytest.raises(torch.linalg.LinAlgError):
            function(matrix.clone())
