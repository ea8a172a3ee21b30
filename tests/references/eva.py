"""EVA's start in plain NumPy, float64: the slow truth that tests compare against.

Paper: "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170v5,
sections 3.2 and 3.5, equation 6, algorithm 1; the authors' code is ml-jku/EVA, src/svd.py, which
PEFT 0.21.2 follows in tuners/lora/eva.py and utils/incremental_pca.py.

Rows X_t (n_t, i) are a module's inputs in batch t, of the tokens that count. k = round(ρ·r)
components V (k, i), σ (k,), with the mean μ and the number M of the rows before:

    t = 1:  the SVD of X_1 − mean(X_1)
    t > 1:  of [diag(σ)V ; X_t − mean(X_t) ; √(M·n_t/(M + n_t))·(μ − mean(X_t))]
    ξ_j = σ_j²/T              T = Σ of (X − mean)² over all entries of all rows, so Σ_j ξ_j ≤ 1
    row j stands still when cos(v_j(t−1), v_j(t)) ≥ τ, signs included

A row of V takes the sign that makes its entry of greatest size positive. The budget Σ_k r_k goes to
the greatest ξ of all modules, at most k to each: a module's rank is how many of its ξ are among
them, and may be 0. A module pauses while the rows that its rank needs stand still, and goes on if
its rank grows past them; the batches are run through again and again until all pause.

    A0 = V[:rank] (rank, i),  B0 = 0; whitened A0 = V[:rank]/√σ; from there plain LoRA, no anchor
    α_k = α·rank_k/r_k keeps s = α/r as it was (`adjust_scaling_factors`; the paper's section 4.1)

Equation 6 differs from both codes: ξ_j = σ_j²/((M − 1)·‖σ‖_1); and the paper's SVD is of X, the
codes' of X centred. Here is the codes'. Modules of equal inputs share one SVD, that of the first,
which never has less rank than they. PEFT whitens such a V once for every sharer, which is a slip.
Among the sharers of an SVD all ξ tie. PEFT's sort is not stable, on a CPU either, so which of the
followers gets the last rank is arbitrary there; here it is the earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np
from numpy.typing import ArrayLike

from references.lora import Array, f64
from references.pissa import Triplets, exact_svd

Svd = Callable[[Array, int], Triplets]
"""X (n, i), the number of updates before -> the triplets of X, at least k where it has them.

Exact, or PEFT's: `references.pissa.lowrank_svd`, 4 iterations, on a draw (min(n, i), 2k) of torch
seeded with 42 each time, in float32 at the first update and in float64 at the later ones, for its
running mean is float64 and takes X with it.
"""


def signed(V: ArrayLike) -> Array:
    """Every row (k, i) with the sign that makes its entry of greatest size positive."""
    V = f64(V)
    greatest = np.argmax(np.abs(V), axis=1)
    turned: Array = V * np.sign(V[np.arange(len(V)), greatest])[:, None]
    return turned


class IncrementalSVD:
    """The leading k right singular vectors of the centred rows seen so far."""

    def __init__(self, components: int, svd: Svd | None = None) -> None:
        self.k = components
        self.svd: Svd = svd or (lambda X, _: exact_svd(X, min(X.shape)))
        self.updates, self.seen, self.total, self.mean = 0, 0, 0.0, np.zeros(0)
        self.V, self.sigma = np.zeros((0, 0)), np.zeros(0)
        self.still = np.zeros(components, dtype=bool)

    def update(self, X: ArrayLike, tau: float) -> None:
        """One batch (n, i); one of fewer rows than components is passed over, as in PEFT."""
        X = f64(X)
        n, mean, before = len(X), X.mean(axis=0), self.V
        if n < self.k:
            return
        rows = X - mean
        self.total += float(np.sum(rows**2))
        if self.updates:
            step = np.sqrt(self.seen * n / (self.seen + n)) * (self.mean - mean)
            self.total += float(np.sum(step**2))
            rows = np.vstack([self.sigma[:, None] * self.V, rows, step])
            mean = (self.seen * self.mean + n * mean) / (self.seen + n)
        _, sigma, Vt = self.svd(rows, self.updates)
        self.updates, self.seen, self.mean = self.updates + 1, self.seen + n, mean
        self.sigma, self.V = sigma[: self.k], signed(Vt[: self.k])
        if len(before):
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(self.V, axis=1)
            self.still = np.sum(before * self.V, axis=1) / norms >= tau

    @property
    def ratios(self) -> Array:
        """ξ (k,): the share of all the variance that each component explains."""
        return self.sigma**2 / self.total


def redistributed(
    ratios: Mapping[str, Array],
    budget: int,
    same: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Every module's rank: its count among the `budget` greatest ξ of all, equals as they come.

    `ratios` holds the modules with an SVD, in order; `same` names further ones and the module whose
    ξ they share. Those come after, and swap ranks with that module if theirs is the greater.
    """
    owners = {name: name for name in ratios} | dict(same or {})
    entries = [(name, xi) for name, first in owners.items() for xi in ratios[first]]
    chosen = [name for name, _ in sorted(entries, key=lambda entry: -entry[1])[:budget]]
    ranks = {name: chosen.count(name) for name in owners}
    for name, first in (same or {}).items():
        if ranks[name] > ranks[first]:
            ranks[name], ranks[first] = ranks[first], ranks[name]
    return ranks


def equal_inputs(batches: Mapping[str, Sequence[ArrayLike]]) -> dict[str, str]:
    """The modules whose first batch is, bit for bit, an earlier one's: name -> that one's name."""
    first: dict[tuple[object, bytes], str] = {}
    same: dict[str, str] = {}
    for name, inputs in batches.items():
        key = (np.shape(inputs[0]), f64(inputs[0]).tobytes())
        if first.setdefault(key, name) != name:
            same[name] = first[key]
    return same


def start(
    batches: Mapping[str, Sequence[ArrayLike]],
    ranks: Mapping[str, int],
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    svd: Svd | None = None,
    limit: int = 1000,
) -> dict[str, Array]:
    """Every module's A0 (its new rank, i), in the order of `batches`; B0 is 0 (o, rank).

    `batches` are a module's inputs, (n_t, i) each, equally many for all; `ranks` its rank before.
    RuntimeError if they do not come to rest within `limit` batches, where PEFT would not end.
    """
    same = equal_inputs(batches)
    most = {name: round(ranks[name] * rho) for name in batches}
    for first in set(same.values()):
        group = [first, *(name for name in same if same[name] == first)]
        most |= dict.fromkeys(group, max(most[name] for name in group))
    trackers = {name: IncrementalSVD(most[name], svd) for name in batches if name not in same}
    given = dict(most)
    for t in count():
        moving = [name for name, it in trackers.items() if not it.still[: given[name]].all()]
        if not moving:
            break
        if t == limit:
            raise RuntimeError(f"after {limit} batches these have not come to rest: {moving}")
        for name in moving:
            trackers[name].update(batches[name][t % len(batches[name])], tau)
        if all(tracker.updates for tracker in trackers.values()):
            found = {name: tracker.ratios for name, tracker in trackers.items()}
            given = redistributed(found, sum(ranks.values()), same)
    return {name: _factor(trackers[same.get(name, name)], given[name], whiten) for name in batches}


def _factor(tracker: IncrementalSVD, rank: int, whiten: bool) -> Array:
    """A0 (rank, i) of one module."""
    V, sigma = tracker.V[:rank], tracker.sigma[:rank]
    return V / np.sqrt(sigma)[:, None] if whiten else V


def adjusted_alpha(alpha: float, rank: int, before: int) -> float:
    """α·rank/before: with it α/rank stays what it was; α/√rank, rsLoRA's, does not."""
    return alpha * rank / before


def weight(W0: ArrayLike, A: ArrayLike, B: ArrayLike, s: float) -> Array:
    """W = W0 + s·BA (o, i), plain LoRA's: W0 itself at the start."""
    return f64(W0) + s * (f64(B) @ f64(A))


def trained_parameters(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> int:
    """Σ r_k·(o_k + i_k): the budget keeps Σ r_k and not this sum, for sizes differ."""
    return sum(ranks[name] * (o + i) for name, (o, i) in shapes.items())
