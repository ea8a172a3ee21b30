"""Small parts of the kernels for linear layers: thin products and sums of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_of_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns Σ over the rows of `matrix` (rows, n), (n,), in `dtype`.

    >>> sum_of_rows(torch.ones(3, 2, dtype=torch.bfloat16), torch.float32)
    tensor([3., 3.])
    """
    if matrix.device.type == "cpu":
        return matrix.sum(0).to(dtype)  # with `dtype`, a CPU would cast the whole matrix first
    return matrix.sum(0, dtype=dtype)


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns scale · leftᵀ·right for left (rows, n) and right (rows, m), in one kernel.

    >>> scaled_product(torch.ones(3, 1), torch.ones(3, 2), 0.5)
    tensor([[1.5000, 1.5000]])
    """
    n, m = left.shape[1], right.shape[1]
    if left.device.type == "cpu" and n > m:
        # CPUs take half the time for a product that is wide instead of tall.
        return scaled_product(right, left, scale).T
    return left.new_empty(n, m).addmm_(left.T, right, beta=0, alpha=scale)
