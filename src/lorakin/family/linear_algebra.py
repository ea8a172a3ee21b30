"""Singular value decompositions and orthonormal rows, for members' starts."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 512
"""`leading_rows` is exact up to so many rows or columns; above, it is randomised."""


def leading_triplets(
    matrix: Tensor, rank: int, iterations: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the largest singular triplets of a matrix (m, n): U (m, r), S (r,), Vᵀ (r, n).

    With `iterations` they are approximate, from random numbers that are always the same.
    """
    if iterations is None:
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vt[:rank]
    size = min(rank + 8, *matrix.shape)  # a few extra make the last triplets accurate
    U, S, V = _approximate_svd(matrix, size, iterations)
    return U[:, :rank], S[:rank], V[:, :rank].T


def leading_rows(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns σ (k,) and the right singular vectors (k, n), with their largest entry positive."""
    if min(matrix.shape) <= max(EXACT, 2 * k):
        _, sigma, Vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        _, sigma, V = _approximate_svd(matrix, 2 * k, iterations=4)
        sigma, Vt = sigma.to(matrix.device), V.T.to(matrix.device)
    rows = Vt[:k]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return sigma[:k], rows * largest.sign()


def _approximate_svd(matrix: Tensor, size: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, S and V of an approximate SVD of `size` triplets, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix.cpu(), q=size, niter=iterations)
    return U, S, V


def orthonormal_rows(wide: Tensor) -> Tensor:
    """Returns orthonormal rows that span those of a matrix (r, in), r ≤ in; as it is on meta."""
    return wide if wide.is_meta else torch.linalg.qr(wide.T)[0].T.contiguous()
