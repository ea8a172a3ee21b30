"""Changes of one weight as one, in plain NumPy, float64: the slow truth that tests compare against.

Papers: "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708, algorithm 1, with weights and for one
matrix at a time; "Language Models are Super Mario" (DARE), arXiv 2311.03099, equation 2 with p = 1 − density.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from references.lora import Array, f64


def trim(change: ArrayLike, density: float) -> Array:
    """Only the int(density · numel) entries of the largest size, at least one: (o, i) -> (o, i)."""
    flat = f64(change).ravel()
    kept = max(1, int(density * flat.size))
    largest = sorted(range(flat.size), key=lambda n: -abs(flat[n]))[:kept]
    out = np.zeros_like(flat)
    out[largest] = flat[largest]
    return out.reshape(np.shape(change))


def weighted(changes: Sequence[Array], weights: Sequence[float]) -> Array:
    """Σ w·D: (K, o, i), (K,) -> (o, i)."""
    total = np.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total = total + weight * change
    return total


def elect_and_average(
    changes: Sequence[Array], weights: Sequence[float], elect: str = "total"
) -> Array:
    """Each entry: the sign that wins, then the mean of w·D over those that have it: (K, o, i), (K,) -> (o, i)."""
    out = np.zeros_like(changes[0])
    for at in np.ndindex(out.shape):
        values = [change[at] for change in changes]
        votes = sum(values) if elect == "total" else sum(np.sign(values))
        sign = 1.0 if votes >= 0 else -1.0
        agreeing = [
            w * v for w, v in zip(weights, values, strict=True) if v != 0 and np.sign(v) == sign
        ]
        out[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def combined(
    changes: Sequence[ArrayLike],
    weights: Sequence[float],
    how: str,
    density: float = 1.0,
    elect: str = "total",
) -> Array:
    """What becomes of the changes; DARE only where it drops nothing, density 1."""
    kept = [f64(change) for change in changes]
    if how in ("ties", "magnitude_prune"):
        kept = [trim(change, density) for change in kept]
    return elect_and_average(kept, weights, elect) if "ties" in how else weighted(kept, weights)


def nearest(change: Array, rank: int) -> Array:
    """The nearest matrix of this rank, by the SVD: (o, i) -> (o, i)."""
    u, s, v = np.linalg.svd(change, full_matrices=False)
    near: Array = (u[:, :rank] * s[:rank]) @ v[:rank]
    return near
