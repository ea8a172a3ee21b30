"""LoRA-FA in plain NumPy, float64: the slow truth that tests compare against.

Paper: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303.

LoRA's forward with A (r, i) frozen at its initial value; only B (o, r) trains. Scale s, rows x (N, i), x̃ = mask ⊙ x:

    y   = W0 x + b + s·B z        z = A x̃ (N, r), all that ∂B needs
    ∂B  = s·δᵀz                   δ = ∂L/∂y (N, o)
    ∂x  = δW0 + mask ⊙ (s·(δB)A)
    g_B = s⁻²·∂B·(AAᵀ)⁻¹          optional correction: the minimiser of ‖s·g_B·A − G‖_F, G = δᵀx̃ (o, i)

so s·g_B·A is G projected on the row space of A. With the correction the optimizer is given g_B in place of ∂B.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.lora import AdamW, Array, branch_input, f64


def gradients(
    x: ArrayLike,
    W0: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    delta: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """∂B = s·δᵀz and ∂x = δW0 + mask ⊙ (s·(δB)A); A gets no gradient.

    x (N, i), W0 (o, i), A (r, i), B (o, r), delta (N, o), mask (N, i) or None -> dB (o, r), dx (N, i).
    """
    W0, A, B, delta = f64(W0), f64(A), f64(B), f64(delta)
    z = branch_input(x, mask) @ A.T
    return s * delta.T @ z, delta @ W0 + branch_input(s * (delta @ B) @ A, mask)


def corrected(dB: ArrayLike, A: ArrayLike, s: float) -> Array:
    """g_B = s⁻²·∂B·(AAᵀ)⁻¹: dB (o, r), A (r, i) of full row rank -> (o, r)."""
    A = f64(A)
    return f64(np.linalg.solve(A @ A.T, f64(dB).T).T / s**2)


def train(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    correction: bool = False,
    eps: float = 1e-8,
) -> tuple[Array, Array]:
    """Full-batch regression of y on `target`, loss = mean over all N·o entries of (y − target)², with AdamW on B alone.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, i), B (o, r) -> B (o, r), losses (steps,).
    losses[n] is the loss before step n+1. With `correction` AdamW, moments included, sees g_B only.
    """
    x, A, target, losses = f64(x), f64(A), f64(target), np.empty(steps)
    base = x @ f64(W0).T + (0.0 if bias is None else f64(bias))
    params, optimizer = {"B": f64(B)}, AdamW(lr, eps=eps, weight_decay=weight_decay)
    for n in range(steps):
        error = base + s * (x @ A.T) @ params["B"].T - target
        losses[n] = np.mean(error**2)
        dB, _ = gradients(x, W0, A, params["B"], s, 2 * error / error.size)
        params = optimizer.step(params, {"B": corrected(dB, A, s) if correction else dB})
    return params["B"], losses
