"""The one factor that GPTQ needs of a Hessian, block by block, so that nearly all of it is products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 96
"""Columns at a time: with fewer, products are small and slow; with more, LAPACK has more to do, which is slower."""


def upper_factor_of_inverse(matrix: Tensor) -> Tensor:
    """U [n, n], upper, with matrix⁻¹ = UᵀU, in place of a symmetric `matrix` f64; LinAlgError where it is not positive
    definite.

    U is R⁻¹ where matrix = RRᵀ, R upper: a Cholesky factor from the last column to the first, and its inverse. Both
    take n³/3 operations, where the textbook's way (a factor, the inverse, the factor of that) takes 4n³/3.
    """
    blocks = [slice(max(0, stop - BLOCK_SIZE), stop) for stop in range(len(matrix), 0, -BLOCK_SIZE)]
    inverses = []
    for own in blocks:
        above, below = slice(0, own.start), slice(own.stop, None)
        matrix[: own.stop, own].addmm_(matrix[: own.stop, below], matrix[own, below].T, alpha=-1)
        inverses.append(_inverse_of_block(matrix[own, own]))
        matrix[above, own] = matrix[above, own] @ inverses[-1].T
        matrix[below, own] = 0
    for own, inverse in zip(blocks, inverses, strict=True):  # R to R⁻¹: what lies below and behind is done
        above, below = slice(0, own.start), slice(own.stop, None)
        matrix[above, own] = (matrix[above, own] @ inverse).neg_()
        matrix[above, below].addmm_(matrix[above, own], matrix[own, below])
        matrix[own, below] = inverse @ matrix[own, below]
        matrix[own, own] = inverse
    return matrix


def _inverse_of_block(block: Tensor) -> Tensor:
    """R⁻¹ of a block RRᵀ: turned around, R is the lower factor that LAPACK gives."""
    lower = torch.linalg.cholesky(block.flip(0, 1))
    unit = torch.eye(len(lower), dtype=lower.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
    return inverse.flip(0, 1)
