"""LoRA+ in plain NumPy, float64: the slow truth that tests compare against.

Paper: "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.

LoRA's forward and gradients; only the learning rates differ. A (r, i), B (o, r), scale s, rows x (N, i):

    y    = W0 x + b + s·B(A x)
    ∂B   = s·δᵀ(xAᵀ)         δ = ∂L/∂y (N, o)
    ∂A   = s·Bᵀδᵀx
    lr_A = η,  lr_B = ρη     ρ = `ratio`; B is the factor that starts at zero

Decoupled decay multiplies a parameter by 1 − its own rate · its own decay, so B shrinks by ρη·wd per step.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from references.lora import AdamW, Array, f64


def per_name(value: float | Mapping[str, float], name: str) -> float:
    """The number that belongs to the parameter `name`: one number serves all, a mapping must hold the name."""
    return value[name] if isinstance(value, Mapping) else value


class AdamWGroups:
    """AdamW with a learning rate for each named parameter, and a weight decay and an ε for each, or one for all.

    θ_k ← (1 − lr_k·wd_k)·θ_k − lr_k·m̂_k / (√v̂_k + ε_k), every name k with moments and a step count of its own.
    """

    def __init__(
        self,
        lr: Mapping[str, float],
        weight_decay: float | Mapping[str, float] = 0.0,
        eps: float | Mapping[str, float] = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.optimizers = {
            name: AdamW(rate, betas, per_name(eps, name), per_name(weight_decay, name))
            for name, rate in lr.items()
        }

    def step(self, params: dict[str, Array], grads: dict[str, Array]) -> dict[str, Array]:
        """New parameters, one for each of `params`, same shapes; one without a gradient comes back as it is, undecayed."""
        return {
            name: self.optimizers[name].step({name: p}, grads)[name] for name, p in params.items()
        }


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
    ratio: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> tuple[Array, Array, Array]:
    """Full-batch regression of y on `target`, loss = mean over all N·o entries of (y − target)²; A has rate lr, B ratio·lr.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, i), B (o, r) -> A (r, i), B (o, r), losses (steps,).
    losses[n] is the loss before step n+1. `weight_decay` is that of both factors, each times its own rate.
    """
    x, target, losses = f64(x), f64(target), np.empty(steps)
    base = x @ f64(W0).T + (0.0 if bias is None else f64(bias))
    params, optimizer = (
        {"A": f64(A), "B": f64(B)},
        AdamWGroups({"A": lr, "B": ratio * lr}, weight_decay, eps),
    )
    for n in range(steps):
        down, up = params["A"], params["B"]
        error = base + s * (x @ down.T) @ up.T - target
        losses[n] = np.mean(error**2)
        delta = 2 * error / error.size
        params = optimizer.step(
            params, {"A": s * up.T @ delta.T @ x, "B": s * delta.T @ (x @ down.T)}
        )
    return params["A"], params["B"], losses
