"""OLoRA's start in plain NumPy, float64: the slow truth that tests compare against.

Paper: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775; the code
looked at is PEFT 0.21.2's `olora`.

    W0 = QR,  Q (o, k) of orthonormal columns, R (k, i) upper triangular, k = min(o, i), no pivoting
    A0 = R[:r] (r, i),  B0 = Q[:, :r] (o, r)          neither is divided by the scale s
    W  = W0 + s·(BA − B0A0)                           see `references.anchored`

B0A0 = Q_r Q_rᵀ W0 projects W0 on the span of its first r columns, and equals W0 in those columns.
Free: the sign of a column of Q with its row of R. Householder's form, LAPACK's in numpy and torch,
settles it, and does not make R's diagonal positive. B0A0 is unique if those r columns are
independent.
Uncertain: the paper's text was not at hand, so not its equation numbers, nor whether its W_res has
the factor s; PEFT's has it, and only so is the start the base.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from references.anchored import Pair, plain_pair, residual, trained_parameters, weight
from references.lora import Array, f64

__all__ = ["plain_pair", "product", "residual", "start", "trained_parameters", "weight"]


def start(W0: ArrayLike, rank: int) -> Pair:
    """W0 (o, i) -> A0 (r, i), B0 (o, r); the anchor is the same pair, and s does not enter."""
    Q, R = np.linalg.qr(f64(W0))
    return R[:rank], Q[:, :rank]


def product(W0: ArrayLike, rank: int) -> Array:
    """B0A0 (o, i) without a QR: W0 projected on its first r columns, by least squares."""
    W0 = f64(W0)
    lead = W0[:, :rank]
    fitted: Array = lead @ np.linalg.lstsq(lead, W0, rcond=None)[0]
    return fitted
