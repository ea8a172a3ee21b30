"""PiSSA's start in plain NumPy, float64: the slow truth that tests compare against.

Paper: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv 2404.02948v4, section 3, equations 2 (A), 3 (B), 4 (W_res) and 5 (y). The paper writes y = xW,
so its A is our B, and it has no scale. With a scale PEFT 0.21.2 divides the singular values by it:

    W0 = U S Vᵀ,  U (o, k), S (k,) falling, Vᵀ (k, i), k = min(o, i)
    A0 = √(S_r/s)·V_rᵀ (r, i),  B0 = U_r·√(S_r/s) (o, r),  so s·B0A0 = U_r S_r V_rᵀ for any s > 0
    W  = W0 + s·(BA − B0A0)          see `references.anchored`

The fast form (`pissa_niter_n` in PEFT; the paper's appendix B) takes the r triplets of a randomised
SVD with n subspace iterations and no oversampling: a function of W0 and of the draw R alone.
The paper's appendix C turns the trained pair into plain LoRA of rank 2r, as `plain_pair` does.

Free: the sign of each row of A0 with its column of B0, and the basis within equal singular values.
B0A0 is unique where S_r > S_{r+1}: its error in float32 goes with 1e-7·S_1/(S_r − S_{r+1}).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.anchored import Pair, plain_pair, residual, trained_parameters, weight
from references.lora import Array, f64

__all__ = ["exact_svd", "factors", "fast_start", "lowrank_svd", "start"]
__all__ += ["plain_pair", "residual", "trained_parameters", "weight"]

Triplets = tuple[Array, Array, Array]
"""U (o, k), S (k,) falling, Vᵀ (k, i)."""


def exact_svd(M: ArrayLike, count: int) -> Triplets:
    """The `count` greatest triplets: M (o, i) -> U (o, count), S (count,), Vᵀ (count, i)."""
    U, S, Vt = np.linalg.svd(f64(M), full_matrices=False)
    return U[:, :count], S[:count], Vt[:count]


def lowrank_svd(M: ArrayLike, R: ArrayLike, iterations: int) -> Triplets:
    """Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1; `torch.svd_lowrank`.

    M (o, i), R (min(o, i), q) a standard Gaussian draw -> q triplets, or min(o, i) if that is less.
    A wide M is transposed first. torch draws R in M's dtype from its global generator.
    """
    M, R = f64(M), f64(R)
    if M.shape[0] < M.shape[1]:
        U, S, Vt = lowrank_svd(M.T, R, iterations)
        return Vt.T, S, U.T
    Q = np.linalg.qr(M @ R)[0]
    for _ in range(iterations):
        Q = np.linalg.qr(M @ np.linalg.qr(M.T @ Q)[0])[0]
    U, S, Vt = np.linalg.svd(Q.T @ M, full_matrices=False)
    return Q @ U, S, Vt


def factors(U: ArrayLike, S: ArrayLike, Vt: ArrayLike, s: float) -> Pair:
    """A0 = √(S/s)·Vᵀ (r, i), B0 = U·√(S/s) (o, r): U (o, r), S (r,), Vᵀ (r, i), s > 0."""
    root = np.sqrt(f64(S) / s)
    return root[:, None] * f64(Vt), f64(U) * root


def start(W0: ArrayLike, rank: int, s: float) -> Pair:
    """W0 (o, i) -> A0 (r, i), B0 (o, r); the anchor is the same pair."""
    return factors(*exact_svd(W0, rank), s)


def fast_start(W0: ArrayLike, R: ArrayLike, iterations: int, s: float) -> Pair:
    """The same from the randomised SVD: R (min(o, i), r) -> A0 (r, i), B0 (o, r)."""
    return factors(*lowrank_svd(W0, R, iterations), s)
