"""LoRA-XS in plain NumPy, float64: the slow truth that tests compare against.

Paper: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604;
the authors' code is MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py and latent_utils.py.

Frozen W0 (o, i), and B (o, r), A (r, i) of its SVD; trained R (r, r) from N(0, 1e-5²); s = α/r:

    W0 = U S Vᵀ,  B = U_r S_r,  A = V_rᵀ      the paper's, whose A is our B
    W  = W0 + s·B R A,  y = W x + b           R alone trains; it is not 0, so W is only near W0
    ∂R = s·BᵀG Aᵀ                             G = ∂L/∂W (o, i)

The authors' code takes the SVD of W0ᵀ, so there the values stand on the input side: B = U_r,
A = S_r V_rᵀ (`values="input"`). Both reach the same changes B R A, but the gradient of R is S_r·D
in the paper's form and D·S_r in the code's, D = s·U_rᵀ G V_r, so they train differently.
The SVD's signs are free, and R belongs to the A and B it was trained with: save them or fix them.
Uncertain: the paper's text was not at hand: its placing of S_r is methods.md's; the factor s is the
code's (`scaling`, lora_alpha / r), which fixes the deviation at 1e-5 too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.lora import AdamW, Array, f64, forward
from references.pissa import exact_svd

DEVIATION = 1e-5


def frozen(W0: ArrayLike, rank: int, values: str = "output") -> tuple[Array, Array]:
    """W0 (o, i) -> A (r, i), B (o, r); `values`: S_r stands in B, "output", or in A, "input"."""
    U, S, Vt = exact_svd(W0, rank)
    return (Vt, U * S) if values == "output" else (S[:, None] * Vt, U)


def start(draw: ArrayLike) -> Array:
    """R (r, r) from a standard normal draw of the same shape."""
    return DEVIATION * f64(draw)


def weight(W0: ArrayLike, A: ArrayLike, B: ArrayLike, R: ArrayLike, s: float) -> Array:
    """W = W0 + s·B R A: W0 (o, i), A (r, i), B (o, r), R (r, r) -> W (o, i)."""
    return f64(W0) + s * (f64(B) @ f64(R) @ f64(A))


def plain_pair(A: ArrayLike, B: ArrayLike, R: ArrayLike) -> tuple[Array, Array]:
    """The change as a plain LoRA pair of rank r and the same scale: -> A (r, i), B R (o, r)."""
    return f64(A), f64(B) @ f64(R)


def gradient(A: ArrayLike, B: ArrayLike, s: float, G: ArrayLike) -> Array:
    """∂R = s·BᵀG Aᵀ (r, r) for G = ∂L/∂W (o, i)."""
    dR: Array = s * f64(B).T @ f64(G) @ f64(A).T
    return dR


def trained_parameters(r: int) -> int:
    """r² for each module, whatever its sizes."""
    return r * r


def train(
    x: ArrayLike,
    target: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    B: ArrayLike,
    R: ArrayLike,
    s: float,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
) -> tuple[Array, Array]:
    """Full-batch regression, loss = mean over N·o entries of (y − target)², with AdamW on R alone.

    x (N, i), target (N, o), W0 (o, i), bias (o,) or None, A (r, i), B (o, r), R (r, r) -> R,
    losses (steps,). losses[n] is the loss before step n+1.
    """
    params, losses = {"R": f64(R)}, np.empty(steps)
    optimizer = AdamW(lr, weight_decay=weight_decay)
    for n in range(steps):
        error = forward(x, W0, bias, A, f64(B) @ params["R"], s) - f64(target)
        losses[n] = np.mean(error**2)
        G = (2 * error / error.size).T @ f64(x)
        params = optimizer.step(params, {"R": gradient(A, B, s, G)})
    return params["R"], losses
