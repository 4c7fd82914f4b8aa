"""The factor of the inverse against numpy's inverse, and against two by two by hand."""

import numpy as np
import pytest
import torch

from qtool.cholesky import BLOCK_SIZE, upper_factor_of_inverse


def positive_definite(n, seed=0):
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / n + 0.01 * torch.eye(n, dtype=torch.float64)


def test_two_by_two_by_hand():
    """The inverse of [[2, 2], [2, 4]] is [[1, -1/2], [-1/2, 1/2]] = UᵀU."""
    found = upper_factor_of_inverse(torch.tensor([[2.0, 2.0], [2.0, 4.0]], dtype=torch.float64))
    np.testing.assert_allclose(found, [[1, -0.5], [0, 0.5]], rtol=1e-15)


@pytest.mark.parametrize("n", [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 300])
def test_it_is_the_upper_cholesky_factor_of_the_inverse(n):
    matrix = positive_definite(n)
    expected = np.linalg.cholesky(np.linalg.inv(matrix.numpy())).T
    found = upper_factor_of_inverse(matrix)
    assert found is matrix  # no other of its size is made
    np.testing.assert_array_equal(found, np.triu(found))
    np.testing.assert_allclose(found, expected, atol=1e-9 * abs(expected).max())


@pytest.mark.parametrize("at", [0, BLOCK_SIZE, 299])
def test_what_is_not_positive_definite_is_refused_wherever_it_shows(at):
    matrix = positive_definite(300)
    matrix[at, at] = -1
    with pytest.raises(torch.linalg.LinAlgError):
        upper_factor_of_inverse(matrix)
