"""VeRA in plain NumPy, float64: the slow truth that tests compare against.

Paper: "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454.

One frozen random pair A (r, ≥i), B (≥o, r) serves all layers, each taking its leading i columns and leading o rows; each
layer trains d (r,) and b (o,). No α and no scale. bias (o,) is b0, rows x (N, i), x̃ = mask ⊙ x:

    y    = W0 x + b0 + b ⊙ (B(d ⊙ u))          u = A x̃ (N, r)
    ∂b   = Σ_rows δ ⊙ B(d ⊙ u)                 δ = ∂L/∂y (N, o)
    ∂d   = Σ_rows (Bᵀ(b ⊙ δ)) ⊙ u
    ∂x   = δW0 + mask ⊙ ((d ⊙ (Bᵀ(b ⊙ δ)))A)
    up   = diag(b)·B[:o],  down = diag(d)·A[:, :i],  W = W0 + up·down
    init = A uniform in ±√(6/max i), B in ±√(6/r); d = 0.1, b = 0
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from references.lora import AdamW, Array, branch_input, f64


def uniform_bounds(max_in: int, rank: int) -> tuple[float, float]:
    """The bounds (a, c) of the shared draw, A from U(−a, a) and B from U(−c, c): Kaiming, gain √2, fan_in of each matrix."""
    return math.sqrt(6 / max_in), math.sqrt(6 / rank)


def sliced(A: ArrayLike, B: ArrayLike, o: int, i: int) -> tuple[Array, Array]:
    """A layer's share of the frozen pair: A (r, ≥i), B (≥o, r) -> A (r, i), B (o, r)."""
    A, B = f64(A), f64(B)
    if A.shape[1] < i or B.shape[0] < o:
        raise ValueError(
            f"a pair of shapes {A.shape} and {B.shape} is too small for a layer of shape {(o, i)}"
        )
    return A[:, :i], B[:o]


def pair(
    A: ArrayLike, B: ArrayLike, d: ArrayLike, b: ArrayLike, o: int, i: int
) -> tuple[Array, Array]:
    """The plain LoRA pair of scale 1: A (r, ≥i), B (≥o, r), d (r,), b (o,) -> up = diag(b)B (o, r), down = diag(d)A (r, i)."""
    A, B = sliced(A, B, o, i)
    return f64(b)[:, None] * B, f64(d)[:, None] * A


def forward(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    d: ArrayLike,
    b: ArrayLike,
    mask: ArrayLike | None = None,
) -> Array:
    """y = W0 x + b0 + b ⊙ (B(d ⊙ (A x̃))) for every row of x.

    x (N, i), W0 (o, i), bias (o,) or None, A (r, ≥i), B (≥o, r), d (r,), b (o,), mask (N, i) or None -> y (N, o).
    """
    W0 = f64(W0)
    A, B = sliced(A, B, *W0.shape)
    y = f64(x) @ W0.T + f64(b) * ((f64(d) * (branch_input(x, mask) @ A.T)) @ B.T)
    return y if bias is None else y + f64(bias)


def gradients(
    x: ArrayLike,
    W0: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    d: ArrayLike,
    b: ArrayLike,
    delta: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """The closed-form gradients of a loss whose gradient with respect to y is `delta`.

    x (N, i), W0 (o, i), A (r, ≥i), B (≥o, r), d (r,), b (o,), delta (N, o), mask (N, i) or None -> dd (r,), db (o,), dx (N, i).
    """
    W0, d, b, delta = f64(W0), f64(d), f64(b), f64(delta)
    A, B = sliced(A, B, *W0.shape)
    u, back = branch_input(x, mask) @ A.T, (b * delta) @ B  # both (N, r)
    dd = np.sum(back * u, axis=0)
    db = np.sum(delta * ((d * u) @ B.T), axis=0)
    dx = delta @ W0 + branch_input((d * back) @ A, mask)
    return dd, db, dx


def train(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    d: ArrayLike,
    b: ArrayLike,
    steps: int,
    lr: float,
) -> tuple[Array, Array, Array]:
    """Full-batch regression of y on `target`, loss = mean over all N·o entries of (y − target)², Adam on d and b, no decay.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, ≥i), B (≥o, r), d (r,), b (o,)
    -> d (r,), b (o,), losses (steps,).
    losses[n] is the loss before step n+1.
    """
    params, optimizer, losses = {"d": f64(d), "b": f64(b)}, AdamW(lr), np.empty(steps)
    for n in range(steps):
        error = forward(x, W0, bias, A, B, params["d"], params["b"]) - f64(target)
        losses[n] = np.mean(error**2)
        dd, db, _ = gradients(x, W0, A, B, params["d"], params["b"], 2 * error / error.size)
        params = optimizer.step(params, {"d": dd, "b": db})
    return params["d"], params["b"], losses
