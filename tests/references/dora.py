"""DoRA in plain NumPy, float64: the slow truth that tests compare against.

Paper: "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.

Frozen W0 (o, i), trained A (r, i), B (o, r) and one magnitude m (o,) per output unit, scale s, rows x (N, i), x̃ = mask ⊙ x:

    V    = W0 + s·BA,  n_j = ‖row j of V‖₂,  g = m/n, and g_j = 1 where n_j = 0
    y    = W0 x + (g−1) ⊙ (W0 x̃) + g ⊙ (s·B(A x̃)) + b        without a mask: g ⊙ (V x) + b
    W    = diag(g)·V                                           the merged weight; m = n at B = 0 gives W0

n is a constant for the gradients of A, B and x (the paper, section 4.3). With δ = ∂L/∂y (N, o) and γ = g ⊙ δ:

    ∂B   = s·γᵀ(x̃Aᵀ)
    ∂A   = s·Bᵀγᵀx̃
    ∂m_j = Σ_rows δ_j (V x̃)_j / n_j, and 0 where n_j = 0       since ∂y/∂g = V x̃: the plain W0 x does not depend on g
    ∂x   = δW0 + mask ⊙ ((γ−δ)W0 + s·(γB)A)                    without a mask: γV
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.lora import Array, branch_input, f64
from references.lora_plus import AdamWGroups


def norms(W0: ArrayLike, up: ArrayLike, down: ArrayLike) -> Array:
    """n_j = ‖row j of W0 + up·down‖₂, formed directly: W0 (o, i), up (o, k), down (k, i) -> n (o,)."""
    return f64(np.linalg.norm(f64(W0) + f64(up) @ f64(down), axis=1))


def gains(n: ArrayLike, m: ArrayLike) -> Array:
    """g = m/n, and 1 where n_j = 0: n (o,), m (o,) -> g (o,)."""
    n = f64(n)
    return np.divide(f64(m), n, out=np.ones_like(n), where=n != 0)


def forward(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    m: ArrayLike,
    mask: ArrayLike | None = None,
) -> Array:
    """y = W0 x + (g−1) ⊙ (W0 x̃) + g ⊙ (s·B(A x̃)) + b for every row of x.

    x (N, i), W0 (o, i), bias (o,) or None, A (r, i), B (o, r), m (o,), mask (N, i) or None -> y (N, o).
    """
    W0, A, B, xd = f64(W0), f64(A), f64(B), branch_input(x, mask)
    g = gains(norms(W0, s * B, A), m)
    y = f64(x) @ W0.T + (g - 1) * (xd @ W0.T) + g * (s * (xd @ A.T) @ B.T)
    return y if bias is None else y + f64(bias)


def gradients(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    m: ArrayLike,
    delta: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """The closed-form gradients, n held constant, of a loss whose gradient with respect to y is `delta`; none needs the bias.

    x (N, i), W0 (o, i), bias (o,) or None, A (r, i), B (o, r), m (o,), delta (N, o), mask (N, i) or None
    -> dA (r, i), dB (o, r), dm (o,), dx (N, i).
    """
    W0, A, B, delta, xd = f64(W0), f64(A), f64(B), f64(delta), branch_input(x, mask)
    n = norms(W0, s * B, A)
    gamma = gains(n, m) * delta
    dA = s * B.T @ gamma.T @ xd
    dB = s * gamma.T @ (xd @ A.T)
    sums = np.sum(delta * (xd @ (W0 + s * B @ A).T), axis=0)
    dm = np.divide(sums, n, out=np.zeros_like(n), where=n != 0)
    dx = delta @ W0 + branch_input((gamma - delta) @ W0 + s * (gamma @ B) @ A, mask)
    return dA, dB, dm, dx


def merged(W0: ArrayLike, A: ArrayLike, B: ArrayLike, s: float, m: ArrayLike) -> Array:
    """W = diag(g)(W0 + s·BA): W0 (o, i), A (r, i), B (o, r), m (o,) -> W (o, i)."""
    up = s * f64(B)
    return gains(norms(W0, up, A), m)[:, None] * (f64(W0) + up @ f64(A))


def train(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    m: ArrayLike,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    ratio: float = 1.0,
    eps: float = 1e-8,
) -> tuple[Array, Array, Array, Array]:
    """Full-batch regression of y on `target`, loss = mean over all N·o entries of (y − target)², with AdamW on A, B and m.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, i), B (o, r), m (o,)
    -> A (r, i), B (o, r), m (o,), losses (steps,).
    losses[n] is the loss before step n+1. A and m have rate lr, B ratio·lr; m never decays; n is constant in each gradient.
    """
    params, losses = {"A": f64(A), "B": f64(B), "m": f64(m)}, np.empty(steps)
    decay = {"A": weight_decay, "B": weight_decay, "m": 0.0}
    optimizer = AdamWGroups({"A": lr, "B": ratio * lr, "m": lr}, decay, eps)
    for n in range(steps):
        down, up, length = params["A"], params["B"], params["m"]
        error = forward(x, W0, bias, down, up, s, length) - f64(target)
        losses[n] = np.mean(error**2)
        dA, dB, dm, _ = gradients(x, W0, bias, down, up, s, length, 2 * error / error.size)
        params = optimizer.step(params, {"A": dA, "B": dB, "m": dm})
    return params["A"], params["B"], params["m"], losses
