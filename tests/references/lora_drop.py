"""LoRA-drop in plain NumPy, float64: the slow truth that tests compare against.

Paper: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation", arXiv 2402.07721.

After a pilot of plain LoRA, for every adapted module k with A_k (r, i), B_k (o, r), over all unmasked tokens x of a sample:

    g_k = Σ_x ‖s·B_k A_k x‖²,  I_k = g_k / Σ_j g_j

The most important modules keep a pair of their own; the others share one pair per group of equal type and shape:

    ∂A = Σ_k s·Bᵀδ_kᵀx_k,  ∂B = Σ_k s·δ_kᵀ(x_kAᵀ)     over the modules k that share (A, B)
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from references.lora import AdamW, Array, f64, forward, gradients

Key = TypeVar("Key", bound=Hashable)


def energy(
    x: ArrayLike, A: ArrayLike, B: ArrayLike, s: float, keep_tokens: ArrayLike | None = None
) -> float:
    """g = Σ over tokens of ‖s·B A x‖²: x (..., i), A (r, i), B (o, r), keep_tokens (...) true where a token counts, or None."""
    rows = f64(x) if keep_tokens is None else f64(x)[np.asarray(keep_tokens).astype(bool)]
    return float(np.sum((s * (rows @ f64(A).T) @ f64(B).T) ** 2))


def importance(energies: ArrayLike) -> Array:
    """I_k = g_k / Σ_j g_j: (M,) -> (M,), which sums to 1; energies that are all 0 have no importance (ValueError)."""
    g = f64(energies)
    if not g.sum() > 0:
        raise ValueError("every energy is 0")
    normalised: Array = g / g.sum()
    return normalised


def choose(
    importance: ArrayLike, threshold: float | None = None, keep: int | None = None
) -> list[int]:
    """The modules that keep their own pair, most important first, equals in module order: I (M,) -> indices.

    With `threshold` θ the shortest prefix of that order whose ΣI ≥ θ, all modules if rounding leaves even their sum below
    θ; with `keep` the first so many.
    """
    if (threshold is None) == (keep is None):
        raise ValueError("give threshold or keep, and not both")
    values = f64(importance)
    order = sorted(range(len(values)), key=lambda k: (-values[k], k))
    if threshold is None:
        return order[:keep]
    total, m = 0.0, 0
    while m < len(order) and total < threshold:
        total, m = total + values[order[m]], m + 1
    return order[:m]


def groups(keys: list[Key], kept: list[int]) -> dict[Key, list[int]]:
    """The modules that share one pair: one (type, shape) key per module, and the kept indices -> key: the others of it."""
    found: dict[Key, list[int]] = {}
    for k, key in enumerate(keys):
        if k not in kept:
            found.setdefault(key, []).append(k)
    return found


def shared_gradients(
    inputs: list[Array], deltas: list[Array], A: ArrayLike, B: ArrayLike, s: float
) -> tuple[Array, Array]:
    """The gradient of a shared pair is the sum over its modules: x_k (N, i), δ_k (N, o) -> dA (r, i), dB (o, r)."""
    A, B = f64(A), f64(B)
    unused = np.zeros((B.shape[0], A.shape[1]))  # W0 only enters dx
    each: list[Any] = [
        gradients(x, unused, A, B, s, delta) for x, delta in zip(inputs, deltas, strict=True)
    ]
    return sum((dA for dA, _, _ in each), np.zeros_like(A)), sum(
        (dB for _, dB, _ in each), np.zeros_like(B)
    )


def train_shared(
    x: ArrayLike,
    target: ArrayLike,
    layers: list[dict[str, Any]],
    A: ArrayLike,
    B: ArrayLike,
    s: float,
    steps: int,
    lr: float,
) -> tuple[Array, Array, Array]:
    """Full-batch regression of y = layer2(layer1(x)) on `target`, loss = mean of (y − target)², AdamW on the one pair.

    x, target (N, d); layers: two dicts of W0 (d, d) and bias (d,) or None; A (r, d), B (d, r), the pair of both layers ->
    A, B, losses (steps,). losses[n] is the loss before step n+1.
    """
    (W1, b1), (W2, b2) = ((layer["W0"], layer["bias"]) for layer in layers)
    params, optimizer, losses = {"A": f64(A), "B": f64(B)}, AdamW(lr), np.empty(steps)
    for n in range(steps):
        pair = params["A"], params["B"]
        hidden = forward(x, W1, b1, *pair, s)
        error = forward(hidden, W2, b2, *pair, s) - f64(target)
        losses[n] = np.mean(error**2)
        delta2 = 2 * error / error.size
        _, _, delta1 = gradients(hidden, W2, *pair, s, delta2)
        dA, dB = shared_gradients([f64(x), hidden], [delta1, delta2], *pair, s)
        params = optimizer.step(params, {"A": dA, "B": dB})
    return params["A"], params["B"], losses
