"""Factors of many modules in one tensor, so that one kernel works on all of one shape.

A factor (n, rank) or (rank, n) is stacked with those of the same shape. A GPU takes as long to
start a kernel as to compute with a factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Factors of one shape, all tall: those that are wide lie transposed."""

    keys: list[str]
    stacked: Tensor
    """(count, n, rank) with n ≥ rank; first the tall factors, then the wide ones."""
    tall: int
    """How many of them are tall."""

    def unstacked(self, stacked: Tensor) -> dict[str, Tensor]:
        """Returns what a tensor like `stacked` has for each factor, in the factor's layout."""
        wide = stacked[self.tall :].transpose(1, 2).contiguous()
        parts = (*stacked[: self.tall].unbind(), *wide.unbind())
        return dict(zip(self.keys, parts, strict=True))


def batches(factors: Iterable[tuple[str, Tensor]]) -> list[Batch]:
    """Stacks the factors by shape, dtype and device.

    >>> [batch] = batches([("P", torch.ones(4, 2)), ("Q", torch.ones(2, 4))])
    >>> batch.keys, tuple(batch.stacked.shape), batch.tall
    (['P', 'Q'], (2, 4, 2), 1)
    """
    groups: dict[object, tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]] = {}
    for key, factor in factors:
        kind = (tuple(sorted(factor.shape)), factor.dtype, factor.device)
        tall, wide = groups.setdefault(kind, ([], []))
        (tall if factor.shape[0] >= factor.shape[1] else wide).append((key, factor))
    return [_stacked(tall, wide) for tall, wide in groups.values()]


def _stacked(tall: Sequence[tuple[str, Tensor]], wide: Sequence[tuple[str, Tensor]]) -> Batch:
    keys = [key for key, _ in (*tall, *wide)]
    tensors = [*(factor for _, factor in tall), *(factor.T for _, factor in wide)]
    return Batch(keys, torch.stack(tensors), len(tall))


def orthogonality_gradients(
    factors: Sequence[tuple[str, Tensor]], kept: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Returns P(PᵀP − I)/‖PᵀP − I‖ of every factor P, or of Qᵀ, in the factor's layout.

    Args:
        factors: keys and factors, in float32 or float64.
        kept: (rank,) by key: 1 for the entries of the diagonal of I, 0 for those left out. None
            keeps all.
    """
    gradients: dict[str, Tensor] = {}
    for batch in batches(factors):
        stacked = batch.stacked
        excess = stacked.transpose(1, 2) @ stacked
        diagonals = excess.diagonal(dim1=1, dim2=2)
        if kept is None:
            diagonals.sub_(1)
        else:
            diagonals.sub_(torch.stack([kept[key] for key in batch.keys]).to(excess))
        sizes = torch.linalg.vector_norm(excess, dim=(1, 2), keepdim=True)
        excess.div_(sizes.clamp_(min=torch.finfo(sizes.dtype).tiny))
        gradients |= batch.unstacked(stacked @ excess)
    return gradients


def means_over_ranks(factors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the mean of every factor for each of its ranks, (rank,), by key."""
    means: dict[str, Tensor] = {}
    for batch in batches(factors):
        means |= dict(zip(batch.keys, batch.stacked.mean(1).unbind(), strict=True))
    return means
