"""AdaLoRA in plain NumPy, float64: the slow truth that tests compare against.

Paper: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

Frozen weight W0 (o, i) and bias b (o,); trained P (o, r), E = λ as a column (r, 1), Q (r, i); s = α/(r0 + 1e-5), r0 the
initial rank; x̃ = mask ⊙ x; δ = ∂L/∂y (N, o); G = δᵀx̃ (o, i):

    y  = W0 x + b + s·P(λ ⊙ (Q x̃))
    ∂P = s·G Qᵀ diag(λ),  ∂λ_j = s·P_jᵀ G Q_jᵀ,  ∂Q = s·diag(λ) Pᵀ G,  ∂x = δW0 + mask ⊙ (s·(δP ⊙ λ)Q)
    R  = mean over all P and Q of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F, unsquared; the loss is task + γR
    I  = |w·∂w|,  Ī ← β1·Ī + (1−β1)·I,  U ← β2·U + (1−β2)·|I − Ī|,  s(w) = Ī·U
    S_j = s(λ_j) + mean over rows of s(P_·j) + mean over columns of s(Q_j·)

A mask keeps the b triplets of greatest S over all matrices and sets the λ of the others to 0; P and Q are never masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from references.lora import AdamW, Array, branch_input, f64

Mask = NDArray[np.bool_]


def scaling(alpha: float, initial_rank: int) -> float:
    """s = α/(r0 + 1e-5), constant after pruning."""
    return alpha / (initial_rank + 1e-5)


def forward(
    x: ArrayLike,
    W0: ArrayLike,
    bias: ArrayLike | None,
    P: ArrayLike,
    E: ArrayLike,
    Q: ArrayLike,
    s: float,
    mask: ArrayLike | None = None,
) -> Array:
    """y = W0 x + b + s·P(λ ⊙ (Q x̃)) for every row of x.

    x (N, i), W0 (o, i), bias (o,) or None, P (o, r), E (r, 1), Q (r, i), mask (N, i) or None -> y (N, o).
    """
    y = f64(x) @ f64(W0).T + s * ((branch_input(x, mask) @ f64(Q).T) * f64(E).T) @ f64(P).T
    return y if bias is None else y + f64(bias)


def gradients(
    x: ArrayLike,
    W0: ArrayLike,
    P: ArrayLike,
    E: ArrayLike,
    Q: ArrayLike,
    s: float,
    delta: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """The closed-form gradients of a loss whose gradient with respect to y is `delta` (N, o).

    Shapes as in `forward` -> dP (o, r), dE (r, 1), dQ (r, i), dx (N, i). A λ of 0 has a gradient like any other.
    """
    W0, P, E, Q, delta = f64(W0), f64(P), f64(E), f64(Q), f64(delta)
    G = delta.T @ branch_input(x, mask)
    dP = s * G @ Q.T * E.T
    dE = s * np.einsum("oj,oi,ji->j", P, G, Q)[:, None]
    dQ = s * E * (P.T @ G)
    dx = delta @ W0 + branch_input(s * ((delta @ P) * E.T) @ Q, mask)
    return dP, dE, dQ, dx


def regulariser(Ps: list[Array], Qs: list[Array]) -> tuple[float, tuple[list[Array], list[Array]]]:
    """R and its exact gradients: Ps of (o, r), Qs of (r, i), M of each -> R, (dPs, dQs) of the same shapes.

    R = (Σ‖PᵀP − I‖_F + Σ‖QQᵀ − I‖_F) / 2M, and ∂‖PᵀP − I‖_F = 2·P(PᵀP − I)/‖PᵀP − I‖_F; at a norm of 0 the gradient is 0.
    """

    def term(P: Array) -> tuple[float, Array]:
        gap = P.T @ P - np.eye(P.shape[1])
        norm = float(np.sqrt(np.sum(gap**2)))
        return norm, 2 * P @ gap / norm if norm > 0 else np.zeros_like(P)

    p_terms, q_terms = [term(f64(P)) for P in Ps], [term(f64(Q).T) for Q in Qs]
    count = len(p_terms) + len(q_terms)
    R = sum(norm for norm, _ in p_terms + q_terms) / count
    return R, ([grad / count for _, grad in p_terms], [grad.T / count for _, grad in q_terms])


def budget(n: int, T: int, t_i: int, t_f: int, b0: int, bT: int) -> int:
    """b(n) = floor(bT + (b0−bT)·(1 − (n−t_i)/(T−t_i−t_f))³) for t_i < n < T−t_f, b0 before that and bT after.

    In integers, so the floor is that of the exact number: 1 − (n−t_i)/(T−t_i−t_f) = (T−t_f−n)/(T−t_f−t_i).
    """
    if n <= t_i:
        return b0
    if n >= T - t_f:
        return bT
    return bT + (b0 - bT) * (T - t_f - n) ** 3 // (T - t_f - t_i) ** 3


def chooses(n: int, T: int, t_i: int, t_f: int, delta_t: int) -> bool:
    """Whether a new pattern is chosen after step n: at multiples of ΔT between t_i and T−t_f, and at T−t_f in any case."""
    return n == T - t_f or (t_i < n < T - t_f and n % delta_t == 0)


def schedule(T: int, t_i: int, t_f: int, delta_t: int, b0: int, bT: int) -> list[int]:
    """The budget in force after step n, for n = 1..T: item n−1; where nothing is chosen it is the previous one, b0 at first."""
    budgets = [b0]
    for n in range(1, T + 1):
        budgets.append(
            budget(n, T, t_i, t_f, b0, bT) if chooses(n, T, t_i, t_f, delta_t) else budgets[-1]
        )
    return budgets[1:]


class Scores:
    """Sensitivity Ī and uncertainty U of named tensors, each of the tensor's shape, both from 0 and without bias correction."""

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.state: dict[str, tuple[Array, Array]] = {}

    def update(self, name: str, w: ArrayLike, grad: ArrayLike) -> None:
        """Ī ← β1·Ī + (1−β1)·I with I = |w·grad|, then U ← β2·U + (1−β2)·|I − Ī| with the new Ī."""
        now = np.abs(f64(w) * f64(grad))
        mean, spread = self.state.get(name, (np.zeros_like(now), np.zeros_like(now)))
        mean = self.beta1 * mean + (1 - self.beta1) * now
        self.state[name] = (mean, self.beta2 * spread + (1 - self.beta2) * np.abs(now - mean))

    def score(self, name: str) -> Array:
        """s(w) = Ī·U, of the tensor's shape."""
        mean, spread = self.state[name]
        return mean * spread


def triplet_scores(sP: ArrayLike, sE: ArrayLike, sQ: ArrayLike) -> Array:
    """S_j = s(λ_j) + mean_rows s(P_·j) + mean_columns s(Q_j·): sP (o, r), sE (r, 1), sQ (r, i) -> (r,)."""
    S: Array = f64(sE)[:, 0] + f64(sP).mean(axis=0) + f64(sQ).mean(axis=1)
    return S


def keep(scores_by_matrix: list[Array], b: int) -> list[Mask]:
    """The b greatest scores over all matrices, exactly b: [(r_k,)] -> [(r_k,)] of bool; of equals the lower (k, j) is kept."""
    ranked = sorted(
        (-score, k, j)
        for k, scores in enumerate(scores_by_matrix)
        for j, score in enumerate(f64(scores))
    )
    kept: list[Mask] = [np.zeros(len(scores), dtype=np.bool_) for scores in scores_by_matrix]
    for _, k, j in ranked[:b]:
        kept[k][j] = True
    return kept


def train(
    x: ArrayLike,
    target: ArrayLike,
    layers: list[dict[str, Any]],
    s: float,
    T: int,
    t_i: int,
    t_f: int,
    delta_t: int,
    target_rank: int,
    lr: float,
    gamma: float = 0.1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    weight_decay: float = 0.0,
) -> dict[str, Any]:
    """Full-batch regression of y = layer2(layer1(x)) on `target`, task loss = mean of (y − target)², AdamW on P, E, Q.

    x (N, i), target (N, o); layers: two dicts of W0, bias (or None), P, E, Q, shapes as in `forward` ->
    `layers` as trained, `losses` (T,): task loss before step n+1, `kept`: T lists of two masks (r,).
    Each step n: gradients of task + γR; scores; AdamW; mask. Between two choices nothing is masked, λ moves freely and
    kept[n−1] repeats the pattern last chosen; after n > T−t_f the last pattern is applied at every step.
    """
    values = {f"{k}.{part}": f64(layer[part]) for k, layer in enumerate(layers) for part in "PEQ"}
    ranks = [values[f"{k}.E"].shape[0] for k in range(len(layers))]
    budgets = schedule(T, t_i, t_f, delta_t, sum(ranks), len(layers) * target_rank)
    optimizer, scores = AdamW(lr, weight_decay=weight_decay), Scores(beta1, beta2)
    pattern: list[Mask] = [np.ones(r, dtype=np.bool_) for r in ranks]
    losses, history = np.empty(T), []
    for n in range(1, T + 1):
        (P1, E1, Q1), (P2, E2, Q2) = ([values[f"{k}.{part}"] for part in "PEQ"] for k in (0, 1))
        hidden = forward(x, layers[0]["W0"], layers[0]["bias"], P1, E1, Q1, s)
        error = forward(hidden, layers[1]["W0"], layers[1]["bias"], P2, E2, Q2, s) - f64(target)
        losses[n - 1] = np.mean(error**2)
        dP2, dE2, dQ2, d_hidden = gradients(
            hidden, layers[1]["W0"], P2, E2, Q2, s, 2 * error / error.size
        )
        dP1, dE1, dQ1, _ = gradients(x, layers[0]["W0"], P1, E1, Q1, s, d_hidden)
        _, ((rP1, rP2), (rQ1, rQ2)) = regulariser([P1, P2], [Q1, Q2])
        grads = {"0.P": dP1 + gamma * rP1, "0.E": dE1, "0.Q": dQ1 + gamma * rQ1}
        grads |= {"1.P": dP2 + gamma * rP2, "1.E": dE2, "1.Q": dQ2 + gamma * rQ2}
        for name, value in values.items():
            scores.update(name, value, grads[name])
        values = optimizer.step(values, grads)
        if chooses(n, T, t_i, t_f, delta_t):
            S = [triplet_scores(*(scores.score(f"{k}.{part}") for part in "PEQ")) for k in (0, 1)]
            pattern = keep(S, budgets[n - 1])
        if chooses(n, T, t_i, t_f, delta_t) or n > T - t_f:
            values |= {
                f"{k}.E": np.where(pattern[k][:, None], values[f"{k}.E"], 0.0) for k in (0, 1)
            }
        history.append(pattern)
    trained = [
        layer | {part: values[f"{k}.{part}"] for part in "PEQ"} for k, layer in enumerate(layers)
    ]
    return {"layers": trained, "losses": losses, "kept": history}
