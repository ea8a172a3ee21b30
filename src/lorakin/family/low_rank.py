"""Pairs of a smaller rank: the nearest one to a change, by the rank or the error that is asked for.

The change of a weight is ΔW = up·down or, with a gain g, diag(g)·(W0 + up·down) − W0, which has as many ranks as g has entries
other than 1. Its nearest pair of rank k (Eckart–Young, in the Frobenius norm) is U_k·(U_kᵀ·ΔW), U_k the first k left singular
vectors of ΔW. Weighted by what the module really sees, C = E[x·xᵀ] = root·rootᵀ, the nearest pair by E‖ΔW x − up·down x‖² is
the same with the left singular vectors of ΔW·root.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family.pair import Pair


@dataclasses.dataclass(frozen=True)
class Fit:
    """How near a pair of small rank comes to a change. Errors are relative: 0 is exact, 1 is no change at all."""

    rank: int
    error: float
    """‖ΔW − up·down‖ / ‖ΔW‖, Frobenius."""
    output_error: float | None = None
    """The same of the module's outputs, over the inputs that `root` stands for."""
    gain: float | None = None
    """The largest |g − 1|, for a change with a gain."""
    asked: float = 0.0
    """The error that a limit on the error is about: of the outputs over C if there is a root, else of the weights."""


def nearest(
    pair: Pair,
    weight: Tensor,
    *,
    rank: int | None = None,
    error: float | None = None,
    root: Tensor | None = None,
) -> tuple[Pair, Fit]:
    """The nearest pair without a gain, of at most `rank`, or of the smallest rank whose relative error is at most `error`.

    A pair that needs no change comes back as it is.

    Args:
        pair: the change.
        weight: W0 (outputs, inputs), which a gain scales too; not used without one.
        rank: at least 1.
        error: in the outputs if there is a `root`, else in the weights.
        root: (inputs, inputs), with C = root·rootᵀ.

    Raises:
        SettingError: a gain, and neither rank nor error.
    """
    if pair.gain is None and error is None and (rank is None or pair.down.shape[0] <= rank):
        return pair, Fit(pair.down.shape[0], 0.0, None if root is None else 0.0)
    if rank is None and error is None:
        raise SettingError(
            "a change with a gain is no low-rank pair; name the rank, or the error, of its nearest one"
        )
    left, core = _factored(pair, weight)
    near, fit = _nearest(left, core, rank=rank, error=error, root=root)
    fit = dataclasses.replace(
        fit, gain=None if pair.gain is None else float((pair.gain - 1).abs().max())
    )
    return Pair(near.up.to(pair.up.dtype), near.down.to(pair.down.dtype)), fit


def nearest_to(
    change: Tensor, *, rank: int | None = None, error: float | None = None
) -> tuple[Pair, Fit]:
    """The same of a change that is no pair: a matrix (outputs, inputs), of any rank, in whose dtype the pair is."""
    near, fit = _nearest(None, change.double(), rank=rank, error=error)
    return Pair(near.up.to(change.dtype), near.down.to(change.dtype)), fit


def _nearest(
    left: Tensor | None,
    core: Tensor,
    *,
    rank: int | None,
    error: float | None,
    root: Tensor | None = None,
) -> tuple[Pair, Fit]:
    """Of an orthonormal left factor (None: the identity) times a core, both float64."""
    seen = core if root is None else core @ root.double()
    vectors, values = _left_singular(seen)
    kept = min(len(values) if rank is None else rank, _true_rank(values))
    if error is not None:
        kept = min(kept, _enough(values, error))
    vectors, values = vectors[:, :kept], values[:kept].sqrt()
    down = vectors.T @ core
    near = Pair(
        _times(left, vectors * values), down / values.unsqueeze(1)
    )  # both sides of one size, for narrow dtypes
    rest = core - vectors @ down
    of_weights = _ratio(rest, core)
    of_outputs = None if root is None else _ratio(seen - vectors @ (vectors.T @ seen), seen)
    fit = Fit(
        rank=kept,
        error=of_weights,
        output_error=of_outputs,
        asked=of_weights if of_outputs is None else of_outputs,
    )
    return near, fit


def padded(pair: Pair, rank: int) -> Pair:
    """The same change as a pair of a larger rank, with zeros."""
    more = rank - pair.down.shape[0]
    zeros = torch.nn.functional.pad
    return Pair(zeros(pair.up, (0, more)), zeros(pair.down, (0, 0, 0, more)), pair.gain)


def root_of_samples(x: Tensor, ridge: float = 1e-2) -> Tensor:
    """The (inputs, inputs) root of E[x·xᵀ] over samples (tokens, inputs), in float64.

    `ridge` times the mean of its diagonal is added, so that directions which few samples show are not given up entirely.
    """
    wide = x.double()
    moment = wide.T @ wide / max(1, len(wide))
    floor = ridge * (float(moment.diagonal().mean()) or 1.0)
    root: Tensor = torch.linalg.cholesky(
        moment + floor * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    )
    return root


def _factored(pair: Pair, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """The change as an orthonormal left factor (None: the identity) times a core, in float64."""
    up, down = pair.up.double(), pair.down.double()
    if pair.gain is None:
        left, triangle = torch.linalg.qr(up)
        return left, triangle @ down
    wide, gain = weight.double(), pair.gain.double().unsqueeze(1)
    return None, (gain - 1) * wide + gain * (up @ down)


def _times(left: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if left is None else left @ matrix


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (outputs, k) and singular values (k,), largest first, from the Gram matrix of the smaller side."""
    tall = matrix.shape[0] > matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)
    values, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    if tall:  # U = M·V / σ; QR instead of the division, since small σ are not exact
        vectors, triangle = torch.linalg.qr(matrix @ vectors)
        vectors = vectors * triangle.diagonal().sign()
    return vectors, values


def _true_rank(values: Tensor) -> int:
    """How many singular values are more than rounding: of float64, squared and back."""
    return int((values > 1e-7 * values.max()).sum()) if len(values) else 0


def _enough(values: Tensor, error: float) -> int:
    """The smallest count of leading values that leaves at most this relative error."""
    squares = values.square()
    left = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return int((left.clamp(min=0) > error**2 * squares.sum()).sum())


def _ratio(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size else 0.0
