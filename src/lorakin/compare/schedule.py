"""What a comparison has still to run, read off the rows that are there; so a killed one goes on where it was.

Each arm's learning rate is swept with the first seed over half decades around its usual one, upwards first, since a short run
wants a larger rate; while the best lies at an edge the sweep goes one further. At the best rate by the loss on the tuning
rows the other seeds follow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from lorakin.compare.arms import Arm
from lorakin.compare.results import (
    DIVERGED,
    DONE,
    LIMIT,
    REFUSED,
    SEED,
    SWEEP,
    TIMING,
    ResultRow,
    Trial,
)

FIRST = (0, 1, 2)
"""Half decades above the usual rate at which a sweep begins."""
MOST = 7
"""Rates that a sweep may take."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How learning rates are chosen: swept by half decades (`rates` is None), or among those given."""

    rates: tuple[float, ...] | None = None

    def first(self, arm: Arm) -> list[float]:
        """Where an arm's sweep begins."""
        assert arm.lr is not None
        return (
            list(self.rates) if self.rates is not None else [rate(arm.lr, place) for place in FIRST]
        )

    def next(self, arm: Arm, losses: dict[float, float]) -> float | None:
        """One more rate, after those in `losses`; None when the best one is known."""
        if self.rates is not None or len(losses) >= MOST or arm.lr is None:
            return None
        known, best = sorted(losses), best_rate(losses)
        places = {rate(arm.lr, place): place for place in range(-MOST, MOST + 3)}
        if best is None or best == known[0]:
            return rate(arm.lr, places[known[0]] - 1) if known[0] in places else None
        return rate(arm.lr, places[known[-1]] + 1) if best == known[-1] and best in places else None


def rate(lr: float, place: int) -> float:
    """The learning rate so many half decades above `lr`, to two digits."""
    return float(f"{lr * 10 ** (place / 2):.2g}")


def best_rate(losses: dict[float, float]) -> float | None:
    """The rate with the lowest loss, if any is finite."""
    best = min(losses, key=lambda lr: losses[lr], default=None)
    return best if best is not None and math.isfinite(losses[best]) else None


def swept(arm: str, rows: Iterable[ResultRow]) -> dict[float, float]:
    """Learning rate → loss on the tuning rows, in the arm's sweep so far; infinite where the trial did not end well."""
    return {
        row.trial.lr: row.tune["loss"]
        if row.status == DONE and row.tune and math.isfinite(row.tune["loss"])
        else math.inf
        for row in rows
        if row.trial.arm == arm and row.trial.stage == SWEEP and row.trial.lr is not None
    }


def refusal(arm: Arm, rows: Iterable[ResultRow]) -> str:
    """Why the arm does not run, if it does not."""
    said = (row.reason for row in rows if row.trial.arm == arm.name and row.status == REFUSED)
    return arm.refused or next(said, "")


def remaining(
    arm: Arm, rows: Sequence[ResultRow], seeds: Sequence[int], sweep: Sweep, timed: bool
) -> list[Trial]:
    """The arm's trials that can be run now, given those that are done."""
    mine = [row for row in rows if row.trial.arm == arm.name]
    if refusal(arm, mine):
        return []
    if arm.lr is None:
        return [] if mine else [Trial(arm.name, LIMIT, None, seeds[0])]
    if timed and not any(row.trial.stage == TIMING for row in mine):
        return [Trial(arm.name, TIMING, arm.lr, seeds[0])]
    losses = swept(arm.name, mine)
    if missing := [lr for lr in sweep.first(arm) if lr not in losses]:
        return [Trial(arm.name, SWEEP, lr, seeds[0]) for lr in missing]
    if (further := sweep.next(arm, losses)) is not None:
        return [Trial(arm.name, SWEEP, further, seeds[0])]
    best, there = best_rate(losses), {(row.trial.lr, row.trial.seed) for row in mine}
    return (
        []
        if best is None
        else [Trial(arm.name, SEED, best, s) for s in seeds if (best, s) not in there]
    )


def expected(
    arm: Arm, rows: Sequence[ResultRow], seeds: Sequence[int], sweep: Sweep, timed: bool
) -> int:
    """About how many trials the arm has still to run."""
    if refusal(arm, rows) or arm.lr is None:
        return len(remaining(arm, rows, seeds, sweep, timed))
    now = remaining(arm, rows, seeds, sweep, timed)
    if not now:
        return 0
    return (
        len(now)
        + (0 if now[0].stage == SEED else len(seeds) - 1)
        + (len(sweep.first(arm)) if now[0].stage == TIMING else 0)
    )


def chosen(arm: str, rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The arm's rows at its best learning rate, one a seed; of an arm that does not train, its only row."""
    mine = [
        row
        for row in rows
        if row.trial.arm == arm and row.trial.stage != TIMING and row.status != REFUSED
    ]
    best = best_rate(swept(arm, mine))
    return [
        row
        for row in mine
        if row.trial.lr == best and (best is not None or row.trial.stage == LIMIT)
    ]


__all__ = [
    "DIVERGED",
    "Sweep",
    "best_rate",
    "chosen",
    "expected",
    "rate",
    "refusal",
    "remaining",
    "swept",
]
