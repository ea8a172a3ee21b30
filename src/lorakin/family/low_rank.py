"""The nearest pair of a smaller rank, for a given rank or a given error.

A change ΔW is up·down or, with a gain g, diag(g)·(W0 + up·down) − W0, which has as many ranks as g
has entries other than 1. Its nearest pair of rank k (Eckart–Young, in the Frobenius norm) is
U_k·(U_kᵀ·ΔW), with U_k the first k left singular vectors of ΔW.

Weighted by what the module sees, C = E[x·xᵀ] = root·rootᵀ, the pair nearest in E‖ΔW x − up·down x‖²
is the same, with the left singular vectors of ΔW·root.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family.pair import Pair


@dataclasses.dataclass(frozen=True)
class Fit:
    """How near a pair comes to a change. Errors are relative: 0 is exact, 1 is no change at all."""

    rank: int
    error: float
    """‖ΔW − up·down‖ / ‖ΔW‖, Frobenius."""
    output_error: float | None = None
    """The same for the module's outputs, over the inputs that `root` stands for."""
    gain: float | None = None
    """The largest |g − 1|, for a change with a gain."""
    limited_error: float = 0.0
    """The error that a limit applies to: of the outputs if there is a `root`, else the weights'."""


def nearest(
    pair: Pair,
    weight: Tensor,
    *,
    rank: int | None = None,
    error: float | None = None,
    root: Tensor | None = None,
) -> tuple[Pair, Fit]:
    """Returns the nearest pair without a gain, and how near it is.

    It has at most `rank` ranks, or as few as keep the relative error at or below `error`. A pair
    that needs no change comes back as it is.

    >>> pair = Pair(torch.eye(3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> near, fit = nearest(pair, torch.zeros(3, 3), rank=2)
    >>> near.up.shape, round(fit.error, 3)  # 1 / √(9 + 4 + 1)
    (torch.Size([3, 2]), 0.267)

    Args:
        pair: the change.
        weight: W0 (outputs, inputs), which a gain scales too; unused without a gain.
        rank: at least 1.
        error: of the outputs if there is a `root`, else of the weights.
        root: (inputs, inputs), with C = root·rootᵀ.

    Raises:
        SettingError: the change has a gain, and neither rank nor error is given.
    """
    if pair.gain is None and error is None and (rank is None or pair.down.shape[0] <= rank):
        return pair, Fit(pair.down.shape[0], 0.0, None if root is None else 0.0)
    if rank is None and error is None:
        raise SettingError(
            "a change with a gain is not a low-rank pair; give the rank or error of the nearest one"
        )
    left, core = _left_and_core(pair, weight)
    nearest_pair, fit = _nearest(left, core, rank=rank, error=error, root=root)
    if pair.gain is not None:
        fit = dataclasses.replace(fit, gain=float((pair.gain - 1).abs().max()))
    return Pair(nearest_pair.up.to(pair.up.dtype), nearest_pair.down.to(pair.down.dtype)), fit


def nearest_to(
    change: Tensor, *, rank: int | None = None, error: float | None = None
) -> tuple[Pair, Fit]:
    """Returns the nearest pair to a change that is a matrix (outputs, inputs), in its dtype."""
    nearest_pair, fit = _nearest(None, change.double(), rank=rank, error=error)
    return Pair(nearest_pair.up.to(change.dtype), nearest_pair.down.to(change.dtype)), fit


def _nearest(
    left: Tensor | None,
    core: Tensor,
    *,
    rank: int | None,
    error: float | None,
    root: Tensor | None = None,
) -> tuple[Pair, Fit]:
    """Returns the pair nearest to left·core, both float64; `left` is orthonormal or None for I."""
    weighted = core if root is None else core @ root.to(core)
    vectors, values = _left_singular(weighted)
    rank_kept = min(len(values) if rank is None else rank, _true_rank(values))
    if error is not None:
        rank_kept = min(rank_kept, _rank_within(values, error))

    # Both factors get the same size, which suits narrow dtypes.
    vectors, values = vectors[:, :rank_kept], values[:rank_kept].sqrt()
    down = vectors.T @ core
    nearest_pair = Pair(_product(left, vectors * values), down / values.unsqueeze(1))

    of_weights = _relative_norm(core - vectors @ down, core)
    of_outputs = (
        None
        if root is None
        else _relative_norm(weighted - vectors @ (vectors.T @ weighted), weighted)
    )
    fit = Fit(
        rank=rank_kept,
        error=of_weights,
        output_error=of_outputs,
        limited_error=of_weights if of_outputs is None else of_outputs,
    )
    return nearest_pair, fit


def padded(pair: Pair, rank: int) -> Pair:
    """Returns the same change as a pair of a larger rank, padded with zeros."""
    added = rank - pair.down.shape[0]
    pad = torch.nn.functional.pad
    return Pair(pad(pair.up, (0, added)), pad(pair.down, (0, 0, 0, added)), pair.gain)


def root_of_samples(x: Tensor, ridge: float = 1e-2) -> Tensor:
    """Returns the root (inputs, inputs) of E[x·xᵀ] over samples (tokens, inputs), in float64.

    `ridge` times the mean of the diagonal is added to it, so that directions which few samples
    show keep some weight.
    """
    wide = x.double()
    moment = wide.T @ wide / max(1, len(wide))
    floor = ridge * (float(moment.diagonal().mean()) or 1.0)
    root: Tensor = torch.linalg.cholesky(
        moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    )
    return root


def _left_and_core(pair: Pair, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Returns the change as an orthonormal left factor, None for I, and a core, in float64."""
    up, down = pair.up.double(), pair.down.double()
    if pair.gain is None:
        left, triangle = torch.linalg.qr(up)
        return left, triangle @ down
    wide, gain = weight.double(), pair.gain.double().unsqueeze(1)
    return None, (gain - 1) * wide + gain * (up @ down)


def _product(left: Tensor | None, matrix: Tensor) -> Tensor:
    """Returns left·matrix; None stands for the identity."""
    return matrix if left is None else left @ matrix


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns left singular vectors (outputs, k) and singular values (k,), largest first.

    They come from the Gram matrix of the smaller side.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    values, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    if tall:
        # U = M·V / σ; by QR instead of division, since small σ are inexact.
        vectors, triangle = torch.linalg.qr(matrix @ vectors)
        vectors = vectors * triangle.diagonal().sign()
    return vectors, values


def _true_rank(values: Tensor) -> int:
    """Returns how many singular values exceed what squaring them in float64 rounds off."""
    return int((values > 1e-7 * values.max()).sum()) if len(values) else 0


def _rank_within(values: Tensor, error: float) -> int:
    """Returns the smallest number of leading values that leaves at most this relative error."""
    squares = values.square()
    remaining = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return int((remaining.clamp(min=0) > error**2 * squares.sum()).sum())


def _relative_norm(part: Tensor, whole: Tensor) -> float:
    """Returns ‖part‖ / ‖whole‖, 0 if both are 0."""
    size = float(whole.norm())
    return float(part.norm()) / size if size else 0.0
