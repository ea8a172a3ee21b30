"""Delta-LoRA in plain NumPy, float64: the slow truth that tests compare against.

Paper: "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv 2309.02411.

Weight W0 (o, i) and bias b (o,), trained A (r, i) and B (o, r), scale s. The literal rule, after each optimizer step n > K:

    W_n = W_{n−1} + λ·s·(B_n A_n − B_{n−1} A_{n−1})
    y   = W_n x + b + s·B_n A_n x                          no dropout in the branch

The telescoped form, for n ≥ K, with W0 frozen and the anchor (A_K, B_K) the pair after exactly K steps:

    W_n = W0 + λ·s·(B_n A_n − B_K A_K)
    y   = W0 x + b + (1+λ)·s·B_n A_n x − λ·s·B_K A_K x  =  W0 x + b + up·down·x,  up = s·[B, B_K],  down = [(1+λ)A ; −λA_K]

In both W_n is a constant for A and B: ∂B = s·G Aᵀ, ∂A = s·Bᵀ G with G = δᵀx, and ∂x = δ(W_n + s·BA).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.lora import AdamW, Array, f64, forward, gradients

Anchor = tuple[Array, Array]


def telescoped_pair(
    A: ArrayLike, B: ArrayLike, s: float, lam: float, A_K: ArrayLike, B_K: ArrayLike
) -> tuple[Array, Array]:
    """The whole change as a pair of rank 2r: A, A_K (r, i), B, B_K (o, r) -> up (o, 2r), down (2r, i), the scale inside up."""
    up = s * np.concatenate([f64(B), f64(B_K)], axis=1)
    down = np.concatenate([(1 + lam) * f64(A), -lam * f64(A_K)], axis=0)
    return up, down


def telescoped_base(
    W0: ArrayLike, A: ArrayLike, B: ArrayLike, s: float, lam: float, A_K: ArrayLike, B_K: ArrayLike
) -> Array:
    """W_n = W0 + λs(BA − B_K A_K) (o, i): the base that the literal rule would have reached, without the branch s·BA."""
    return f64(W0) + lam * s * (f64(B) @ f64(A) - f64(B_K) @ f64(A_K))


def telescoped_forward(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    lam: float,
    A_K: ArrayLike,
    B_K: ArrayLike,
) -> Array:
    """y = W0 x + b + (1+λ)s·BA x − λs·B_K A_K x: x (N, i), W0 (o, i), bias (o,) or None, pairs as above -> y (N, o)."""
    x = f64(x)
    now, anchored = (x @ f64(A).T) @ f64(B).T, (x @ f64(A_K).T) @ f64(B_K).T
    y = x @ f64(W0).T + (1 + lam) * s * now - lam * s * anchored
    return y if bias is None else y + f64(bias)


def telescoped_gradients(
    x: ArrayLike,
    W0: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    lam: float,
    A_K: ArrayLike,
    B_K: ArrayLike,
    delta: ArrayLike,
) -> tuple[Array, Array, Array]:
    """Gradients by the stop-gradient rule, `delta` (N, o) the gradient of y -> dA (r, i), dB (o, r), dx (N, i).

    dA and dB are plain LoRA's, 1/(1+λ) of the derivative of `telescoped_forward`; dx is that forward's whole derivative.
    """
    A, B, delta = f64(A), f64(B), f64(delta)
    G = delta.T @ f64(x)
    up, down = telescoped_pair(A, B, s, lam, A_K, B_K)
    return s * B.T @ G, s * G @ A.T, delta @ f64(W0) + (delta @ up) @ down


def train_literal(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    lam: float,
    K: int,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> tuple[Array, Array, Array, Array, Anchor | None]:
    """Full-batch regression, loss = mean of (y − target)², AdamW on A and B, W moving after every step n > K.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, i), B (o, r) -> A, B, W (o, i), losses (steps,),
    anchor (A_K, B_K), None if steps < K. losses[n] is the loss before step n+1. W is without the branch s·BA.
    """
    W, params, losses = f64(W0), {"A": f64(A), "B": f64(B)}, np.empty(steps)
    optimizer = AdamW(lr, eps=eps, weight_decay=weight_decay)
    anchor: Anchor | None = (params["A"], params["B"]) if K == 0 else None
    for n in range(1, steps + 1):
        old = params
        error = forward(x, W, bias, old["A"], old["B"], s) - f64(target)
        losses[n - 1] = np.mean(error**2)
        dA, dB, _ = gradients(x, W, old["A"], old["B"], s, 2 * error / error.size)
        params = optimizer.step(old, {"A": dA, "B": dB})
        if n == K:
            anchor = (params["A"], params["B"])
        if n > K:
            W = W + lam * s * (params["B"] @ params["A"] - old["B"] @ old["A"])
    return params["A"], params["B"], W, losses, anchor


def train_telescoped(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    lam: float,
    K: int,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> tuple[Array, Array, Array, Array, Anchor | None]:
    """What `train_literal` computes, in the same arguments and results, by the telescoped form: W0 never changes.

    The W returned is `telescoped_base` at the end, W0 itself if steps < K.
    """
    params, losses = {"A": f64(A), "B": f64(B)}, np.empty(steps)
    optimizer = AdamW(lr, eps=eps, weight_decay=weight_decay)
    anchor: Anchor | None = (params["A"], params["B"]) if K == 0 else None
    for n in range(1, steps + 1):
        A_n, B_n = params["A"], params["B"]
        if anchor is None:  # plain LoRA, W = W0
            error = forward(x, W0, bias, A_n, B_n, s) - f64(target)
            dA, dB, _ = gradients(x, W0, A_n, B_n, s, 2 * error / error.size)
        else:
            error = telescoped_forward(x, W0, bias, A_n, B_n, s, lam, *anchor) - f64(target)
            dA, dB, _ = telescoped_gradients(
                x, W0, A_n, B_n, s, lam, *anchor, 2 * error / error.size
            )
        losses[n - 1] = np.mean(error**2)
        params = optimizer.step(params, {"A": dA, "B": dB})
        if n == K:
            anchor = (params["A"], params["B"])
    A_n, B_n = params["A"], params["B"]
    W = f64(W0) if anchor is None else telescoped_base(W0, A_n, B_n, s, lam, *anchor)
    return A_n, B_n, W, losses, anchor
