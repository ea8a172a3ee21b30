"""LoRA-GA's start in plain NumPy, float64: the slow truth that tests compare against.

Paper: "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, algorithm 1.
The authors' code is Outsider565/LoRA-GA, peft/src/peft/tuners/lora/layer.py.

W0 (o, i); G (o, i) the mean of ∂L/∂W0 over the first batches; scale s; c = o^(1/4)/√γ, γ = 16:

    G  = U S Vᵀ
    A0 = c·V_{1..r}ᵀ (r, i),  B0 = c·U_{r+1..2r} (o, r)              the authors' "stable"
    A0 = V_{1..r}ᵀ,           B0 = c·U_{r+1..2r}·diag(S_{r+1..2r})   PEFT 0.21.2's "stable"
    W  = W0 + s·(BA − B0A0)                                          see `references.anchored`

So PEFT's B0 grows with the gradient, and the authors' does not know its size: with them
‖B0‖ = c·√r, with PEFT it is near 0 where gradients are small. At the start ∂B = s·GA0ᵀ holds the
first r triplets and ∂A = s·B0ᵀG the next r. Needs 2r ≤ min(o, i), and a G of rank 2r: of fewer than
2r tokens the columns U_{r+1..2r} are arbitrary (PEFT's S makes B0's nearly 0 there).
Both take the triplets from a randomised SVD of q = min(4r, o, i) and 4 iterations, drawn from
torch's global generator; it is exact if q = min(o, i).
Free: A0 and B0 hold different triplets, so A0's rows and B0's columns have free signs of their own,
and not even B0A0 is unique; W at the start is the base all the same.
Uncertain: the paper's text was not at hand. By issue 12 of the authors' repository it has γ in one
place for √γ; algorithm and code have √γ, and the authors call the other a slip.
PEFT takes o from the stored weight's first axis, which for GPT-2's Conv1D is i: its slip.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.anchored import Pair, plain_pair, residual, trained_parameters, weight
from references.lora import Array, f64
from references.pissa import Triplets, exact_svd, lowrank_svd

__all__ = ["lowrank_triplets", "mean_gradient", "stable", "start", "start_peft", "triplets"]
__all__ += ["plain_pair", "residual", "trained_parameters", "weight"]


def mean_gradient(gradients: list[Array]) -> Array:
    """G = Σ_k G_k / n of the batches' full gradients of W0, each (o, i)."""
    mean: Array = np.mean([f64(gradient) for gradient in gradients], axis=0)
    return mean


def triplets(G: ArrayLike, rank: int) -> Triplets:
    """The first 2r: G (o, i) -> U (o, 2r), S (2r,), Vᵀ (2r, i); ValueError if there are fewer."""
    if 2 * rank > min(np.shape(G)):
        raise ValueError(f"rank {rank} needs {2 * rank} triplets of a gradient {np.shape(G)}")
    return exact_svd(G, 2 * rank)


def lowrank_triplets(G: ArrayLike, rank: int, R: ArrayLike) -> Triplets:
    """The same as torch finds them: R (min(o, i), min(4r, o, i)) a standard Gaussian draw."""
    U, S, Vt = lowrank_svd(G, R, 4)
    return U[:, : 2 * rank], S[: 2 * rank], Vt[: 2 * rank]


def stable(o: int, gamma: float = 16.0) -> float:
    """c = o^(1/4)/√γ."""
    return float(o**0.25 / gamma**0.5)


def start(found: Triplets, gamma: float = 16.0) -> Pair:
    """The authors': the 2r triplets of G -> A0 (r, i), B0 (o, r); the anchor is the same pair."""
    U, _, Vt = found
    r, c = len(Vt) // 2, stable(len(U), gamma)
    return c * Vt[:r], c * U[:, r:]


def start_peft(
    found: Triplets,
    s: float,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    top: float = 1.0,
) -> Pair:
    """PEFT's, for every option but the direction "random": the 2r triplets -> A0 (r, i), B0 (o, r).

    `top` is the greatest singular value of W0, which only the scale "weight_svd" uses.
    """
    U, S, Vt = found
    r = len(Vt) // 2
    first, second, odd, even = slice(0, r), slice(r, 2 * r), slice(1, None, 2), slice(0, None, 2)
    ways = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}
    rows, columns = ways[direction]
    A, B = Vt[rows], U[:, columns] * S[columns]
    if scale == "gd_scale":
        return A / s, B / s
    factors = {"stable": stable(len(U), gamma), "weight_svd": top / S[columns][0], "unit": 1.0}
    return A, factors[scale] * B
