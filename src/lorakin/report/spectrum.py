"""Finds the rank that a trained change needs: its singular values, and a rank that keeps most."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from lorakin.family import Pair
from lorakin.storage.summary import layer_and_name

ENERGY = 0.99
"""The share of ‖ΔW‖² that a suggested rank keeps.

What it leaves out is then at most √(1 − 0.99) = a tenth of ‖ΔW‖."""


def singular_values(pair: Pair) -> list[float]:
    """Returns the singular values of up·down, without the gain, the largest first.

    >>> pair = Pair(up=torch.tensor([[3.0], [4.0]]), down=torch.ones(1, 4))
    >>> [round(value, 6) for value in singular_values(pair)]
    [10.0]

    Computed in float64 without forming the product. There are at most as many as the rank.
    """
    up, down = (torch.linalg.qr(factor.double(), mode="r").R for factor in (pair.up, pair.down.T))
    return [float(value) for value in torch.linalg.svdvals(up @ down.T)]


def effective_rank(values: Sequence[float]) -> float:
    """Returns the exponential of the entropy of the singular values (Roy and Vetterli, 2007).

    >>> effective_rank([2.0, 2.0, 0.0]), effective_rank([0.0])
    (2.0, 0.0)
    """
    return float(np.exp(stats.entropy(values))) if any(values) else 0.0


def needed_rank(values: Sequence[float], energy: float = ENERGY) -> int:
    """Returns the smallest rank that keeps the share `energy` of the sum of squares.

    >>> needed_rank([10.0, 1.0, 0.1]), needed_rank([0.0])
    (1, 0)
    """
    squares = np.cumsum(np.square(np.sort(np.asarray(values, float))[::-1]))
    if not squares.size or squares[-1] == 0:
        return 0
    return int(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12))) + 1


def suggested_ranks(
    spectra: Mapping[str, Sequence[float]], energy: float = ENERGY
) -> dict[str, int]:
    """Returns path → a rank that keeps the share `energy` of ‖ΔW‖².

    Ranks are rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, so that few different ones are
    left, but never above the present rank. A module that does not change has rank 0.

    >>> suggested_ranks({"q": [1.0] * 5 + [0.0] * 11, "k": [0.0]})
    {'q': 6, 'k': 0}

    Args:
        spectra: path → singular values.
        energy: the share to keep.
    """
    return {
        path: min(len(values), _rounded(needed_rank(values, energy)))
        for path, values in spectra.items()
    }


def _rounded(rank: int) -> int:
    """Returns the next power of two, or three quarters of it if that is enough."""
    power = 1 << max(rank - 1, 0).bit_length()
    return 0 if rank == 0 else 3 * power // 4 if power >= 4 and rank <= 3 * power // 4 else power


class RankPattern(NamedTuple):
    """Ranks as PEFT's config writes them.

    Attributes:
        rank: of most modules.
        pattern: regular expression → rank of the other modules.
        unchanged: paths of modules that need no pair.
    """

    rank: int
    pattern: dict[str, int]
    unchanged: tuple[str, ...]


def rank_pattern(ranks: Mapping[str, int]) -> RankPattern:
    """Returns ranks by path as few patterns.

    No two patterns match the same module, because PEFT's files lose their order.

    >>> rank_pattern({"layers.0.q": 4, "layers.1.q": 4, "layers.0.k": 8, "layers.1.k": 8})
    RankPattern(rank=4, pattern={'k': 8}, unchanged=())
    """
    unchanged = tuple(path for path, rank in ranks.items() if rank == 0)
    kept = {path: rank for path, rank in ranks.items() if rank}
    usual = Counter(kept.values()).most_common(1)[0][0] if kept else 0
    groups: dict[tuple[str, str, int], list[str]] = {}
    for path, rank in kept.items():
        if rank != usual:
            groups.setdefault((*_kind_of(path), rank), []).append(path)
    return RankPattern(
        usual,
        {_pattern(paths, list(ranks)): rank for (*_, rank), paths in groups.items()},
        unchanged,
    )


def _kind_of(path: str) -> tuple[str, str]:
    """Splits a path into what comes before the layer, and the module's name in the layer."""
    layer, name = layer_and_name(path)
    return path.removesuffix(f"{layer}.{name}").rstrip("."), name


def _pattern(paths: Sequence[str], among: Sequence[str]) -> str:
    """Returns the first candidate that matches `paths` and no other of `among`, as in PEFT."""
    for pattern in _candidates(paths):
        matches = re.compile(rf"(.*\.)?({pattern})$").match
        if [path for path in among if matches(path)] == list(paths):
            return pattern
    raise AssertionError("the last candidate lists the paths themselves")


def _candidates(paths: Sequence[str]) -> Iterator[str]:
    """Yields patterns, the most general first; the last one names each path."""
    before, name = _kind_of(paths[0])
    yield re.escape(name.rpartition(".")[2])
    yield re.escape(name)
    numbers = sorted(
        (layer_and_name(path)[0] for path in paths), key=lambda number: (len(number), number)
    )
    layers = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    yield rf"{re.escape(before.rpartition('.')[2])}\.{layers}\.{re.escape(name)}"
    yield rf"{re.escape(before)}\.{layers}\.{re.escape(name)}"
    yield "|".join(f"^{re.escape(path)}$" for path in paths)
