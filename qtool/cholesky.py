"""The factors that GPTQ needs of a Hessian, block by block, so that nearly all of it is products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 96
"""Columns at a time: with fewer, products are small and slow; with more, LAPACK has more to do, which is slower."""


def upper_factor(matrix: Tensor) -> Tensor:
    """R [n, n], upper, with matrix = RRᵀ, in place of a symmetric `matrix` f64; LinAlgError where it is not positive
    definite. A Cholesky factor from the last column to the first, in n³/3 operations.
    """
    _factor_blocks(matrix)
    return matrix


def inverse_diagonal(matrix: Tensor) -> Tensor:
    """[n] f64, the diagonal of the inverse of `matrix` [n, n] f64, which is used up; errors as above.

    With matrix = RRᵀ the inverse is R⁻ᵀR⁻¹, whose diagonal is the columns of R⁻¹ squared. Another n³/3 operations.
    """
    inverses = _factor_blocks(matrix)
    for own, inverse in zip(_blocks(len(matrix)), inverses, strict=True):  # what lies below and behind is done
        above, below = slice(0, own.start), slice(own.stop, None)
        matrix[above, own] = (matrix[above, own] @ inverse).neg_()
        matrix[above, below].addmm_(matrix[above, own], matrix[own, below])
        matrix[own, below] = inverse @ matrix[own, below]
        matrix[own, own] = inverse
    return matrix.square_().sum(0)


def _blocks(n: int) -> list[slice]:
    """From the last columns to the first."""
    return [slice(max(0, stop - BLOCK_SIZE), stop) for stop in range(n, 0, -BLOCK_SIZE)]


def _factor_blocks(matrix: Tensor) -> list[Tensor]:
    """`matrix` becomes R; returned are the inverses of the blocks on its diagonal, from the last to the first."""
    inverses = []
    for own in _blocks(len(matrix)):
        above, below = slice(0, own.start), slice(own.stop, None)
        matrix[: own.stop, own].addmm_(matrix[: own.stop, below], matrix[own, below].T, alpha=-1)
        matrix[own, own], inverse = _factor_of_block(matrix[own, own])
        matrix[above, own] = matrix[above, own] @ inverse.T
        matrix[below, own] = 0
        inverses.append(inverse)
    return inverses


def _factor_of_block(block: Tensor) -> tuple[Tensor, Tensor]:
    """(R, R⁻¹) of a block RRᵀ: turned around, R is the lower factor that LAPACK gives."""
    lower = torch.linalg.cholesky(block.flip(0, 1))
    unit = torch.eye(len(lower), dtype=lower.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
    return lower.flip(0, 1), inverse.flip(0, 1)
