"""A LoRA pair with a frozen anchor, in plain NumPy, float64: what PiSSA, OLoRA and LoRA-GA train.

These papers take s·B0A0, the pair at its start, out of the base: W_res = W0 − s·B0A0, and train
A and B on that. Here W0 (o, i) is never written: the start (A0, B0) stays beside the trained pair.

    W  = W0 + s·(BA − B0A0)          W = W0 at the start; A, A0 (r, i), B, B0 (o, r)
    ∂A = s·BᵀG,  ∂B = s·GAᵀ          G = ∂L/∂W (o, i); the anchor is a constant
    BA − B0A0 = [B, −B0]·[A ; A0]    so the change is a plain LoRA pair of rank 2r and scale s

Training the pair is LoRA's training on the base `residual(W0, A0, B0, s)`, from A0 and B0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.lora import Array, f64, train

Pair = tuple[Array, Array]
"""A (r, i) and B (o, r)."""


def residual(W0: ArrayLike, A0: ArrayLike, B0: ArrayLike, s: float) -> Array:
    """W_res = W0 − s·B0A0 (o, i): the base that the papers, and PEFT, write into the model."""
    return f64(W0) - s * (f64(B0) @ f64(A0))


def weight(
    W0: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    A0: ArrayLike,
    B0: ArrayLike,
) -> Array:
    """W = W0 + s·(BA − B0A0): W0 (o, i), A, A0 (r, i), B, B0 (o, r) -> W (o, i)."""
    return f64(W0) + s * (f64(B) @ f64(A) - f64(B0) @ f64(A0))


def plain_pair(A: ArrayLike, B: ArrayLike, A0: ArrayLike, B0: ArrayLike) -> Pair:
    """The change as one pair of the same scale: -> [A ; A0] (2r, i), [B, −B0] (o, 2r)."""
    return np.concatenate([f64(A), f64(A0)]), np.concatenate([f64(B), -f64(B0)], axis=1)


def gradients(A: ArrayLike, B: ArrayLike, s: float, G: ArrayLike) -> Pair:
    """∂A = s·BᵀG (r, i), ∂B = s·GAᵀ (o, r) for G = ∂L/∂W (o, i): LoRA's, whatever the anchor."""
    return s * f64(B).T @ f64(G), s * f64(G) @ f64(A).T


def trained_parameters(o: int, i: int, r: int) -> int:
    """r·(o + i), as plain LoRA; the anchor holds as many numbers again and trains none."""
    return r * (o + i)


def train_anchored(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A0: ArrayLike,
    B0: ArrayLike,
    s: float,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Full-batch regression from the start (A0, B0): `references.lora.train` on the residual base.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None -> A (r, i), B (o, r), losses (steps,).
    losses[0] is the loss of the base itself. Decay pulls A and B to 0, so by itself it moves W.
    """
    return train(x, target, residual(W0, A0, B0, s), bias, A0, B0, s, steps, lr, weight_decay)
