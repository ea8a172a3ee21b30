"""What rank a change needs: singular values of its pairs, and a rank for each module that keeps nearly all of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lorakin.family import Pair
from lorakin.storage.summary import place_of

ENERGY = 0.99
"""Of ‖ΔW‖² that a suggested rank keeps. What it leaves out is then at most √(1 − 0.99) = a tenth of ‖ΔW‖."""


def singular_values(pair: Pair) -> list[float]:
    """Those of up·down without its gain, largest first, at most rank many; in float64, without forming the product."""
    up, down = (torch.linalg.qr(factor.double(), mode="r").R for factor in (pair.up, pair.down.T))
    return [float(value) for value in torch.linalg.svdvals(up @ down.T)]


def effective_rank(values: Sequence[float]) -> float:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007); 0 of a change that is none."""
    shares = np.asarray([value for value in values if value > 0], float)
    if not shares.size:
        return 0.0
    shares = shares / shares.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def needed_rank(values: Sequence[float], energy: float = ENERGY) -> int:
    """The smallest rank that keeps the share `energy` of the sum of the squares; 0 of a change that is none."""
    squares = np.cumsum(np.square(np.sort(np.asarray(values, float))[::-1]))
    if not squares.size or squares[-1] == 0:
        return 0
    return int(np.searchsorted(squares, energy * squares[-1] * (1 - 1e-12))) + 1


def suggested_ranks(
    spectra: Mapping[str, Sequence[float]], energy: float = ENERGY
) -> dict[str, int]:
    """Path → a rank that keeps the share `energy` of ‖ΔW‖², from path → singular values.

    It is rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, …, so that a pattern of them is short and no rank grows by half, but never
    beyond the rank that is there. 0 stands for a module that does not change, and needs no pair.
    """
    return {
        path: min(len(values), _rounded(needed_rank(values, energy)))
        for path, values in spectra.items()
    }


def _rounded(rank: int) -> int:
    """The next power of two, or half as much again as one."""
    power = 1 << max(rank - 1, 0).bit_length()
    return 0 if rank == 0 else 3 * power // 4 if power >= 4 and rank <= 3 * power // 4 else power


class RankPattern(NamedTuple):
    """A rank for most modules; regular expression → rank for the others, as in PEFT; and modules to leave out."""

    rank: int
    pattern: dict[str, int]
    unchanged: tuple[str, ...]


def rank_pattern(ranks: Mapping[str, int]) -> RankPattern:
    """Ranks by path as few patterns, no two of which match one module: their order, which PEFT's files lose, means nothing."""
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
    """What stands before a module's layer, and its name in it."""
    layer, name = place_of(path)
    return path.removesuffix(f"{layer}.{name}").rstrip("."), name


def _pattern(paths: Sequence[str], among: Sequence[str]) -> str:
    """The first of the candidates that selects these paths and none else of those; the last one does."""
    found = (
        c
        for c in _candidates(paths)
        if [path for path in among if re.match(rf"(.*\.)?({c})$", path)] == list(paths)
    )
    return next(found)


def _candidates(paths: Sequence[str]) -> Iterator[str]:
    before, name = _kind_of(paths[0])
    yield re.escape(name.rpartition(".")[2])
    yield re.escape(name)
    numbers = sorted(
        (place_of(path)[0] for path in paths), key=lambda number: (len(number), number)
    )
    layers = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    yield rf"{re.escape(before.rpartition('.')[2])}\.{layers}\.{re.escape(name)}"
    yield rf"{re.escape(before)}\.{layers}\.{re.escape(name)}"
    yield "|".join(f"^{re.escape(path)}$" for path in paths)
