"""Decides what a comparison runs next from the rows that it has.

Each arm first sweeps its learning rate with the first seed: at its usual rate and at one and two
half decades above it, because short runs need larger rates. While the best rate is at an edge of
the sweep, the sweep continues there. The other seeds then run at the best rate: by the measure that
decides the comparison, on the tuning rows; of equal ones by the loss there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from lorakin.compare.arms import Arm
from lorakin.compare.report_answers import sign_of
from lorakin.compare.results import (
    DONE,
    REFUSED,
    SEED,
    SWEEP,
    TIMING,
    UNTRAINED,
    ResultRow,
    Trial,
)

FIRST_HALF_DECADES = (0, 1, 2)
"""A sweep begins at these half decades above the usual rate."""
MOST_RATES = 7
"""The most learning rates that a sweep tries."""


Score = tuple[float, float]
"""How bad a rate is: the measure that decides, negative if more of it is better, and the loss."""
DIVERGED_SCORE = (math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How learning rates are chosen: by half decades if `rates` is None, else among `rates`."""

    rates: tuple[float, ...] | None = None

    def first(self, arm: Arm) -> list[float]:
        """Returns the first rates of an arm's sweep."""
        if self.rates is not None:
            return list(self.rates)
        assert arm.lr is not None
        return [rate(arm.lr, half_decades) for half_decades in FIRST_HALF_DECADES]

    def next(self, arm: Arm, scores: Mapping[float, Score]) -> float | None:
        """Returns the next rate to try, or None when the best rate is known.

        Args:
            arm: the arm that is swept.
            scores: those of the rates that were tried, by rate.
        """
        if self.rates is not None or len(scores) >= MOST_RATES or arm.lr is None:
            return None
        lowest, highest, best = min(scores), max(scores), best_rate(scores)
        half_decades_of = {
            rate(arm.lr, half_decades): half_decades
            for half_decades in range(-MOST_RATES, MOST_RATES + 3)
        }
        if best in (None, lowest):  # if all diverged, the rates were too large
            return rate(arm.lr, half_decades_of[lowest] - 1) if lowest in half_decades_of else None
        if best == highest and highest in half_decades_of:
            return rate(arm.lr, half_decades_of[highest] + 1)
        return None


def rate(lr: float, half_decades: int) -> float:
    """Returns the learning rate so many half decades above `lr`, rounded to two digits.

    >>> rate(2e-4, 1)
    0.00063
    """
    return float(f"{lr * 10 ** (half_decades / 2):.2g}")


def best_rate(scores: Mapping[float, Score]) -> float | None:
    """Returns the rate with the lowest score; None if all diverged.

    >>> best_rate({1e-4: (-0.5, 2.0), 1e-3: (-0.9, 1.7), 1e-2: (-0.9, 1.5)})
    0.01
    """
    best = min(scores, key=lambda lr: scores[lr], default=None)
    return best if best is not None and math.isfinite(scores[best][1]) else None


def sweep_scores(arm: str, rows: Iterable[ResultRow], measure: str) -> dict[float, Score]:
    """Returns rate → its score on the tuning rows, of the arm's sweep so far.

    Args:
        arm: the arm's name.
        rows: the results so far.
        measure: "loss", or the metric that decides.
    """
    return {
        row.trial.lr: _score(row, measure)
        for row in rows
        if row.trial.arm == arm and row.trial.stage == SWEEP and row.trial.lr is not None
    }


def sweep_figures(arm: str, rows: Iterable[ResultRow], measure: str) -> dict[float, float]:
    """Returns rate → the measure itself; infinite where a trial diverged or failed."""
    scores = sweep_scores(arm, rows, measure)
    sign = sign_of(measure)
    return {lr: math.inf if bad == math.inf else -sign * bad for lr, (bad, _) in scores.items()}


def _score(row: ResultRow, measure: str) -> Score:
    """Returns a trial's score, infinite where it diverged or failed, or has no such figure."""
    figures = row.tune if row.status == DONE and row.tune is not None else {}
    score = (-sign_of(measure) * figures.get(measure, math.nan), figures.get("loss", math.nan))
    return score if all(map(math.isfinite, score)) else DIVERGED_SCORE


def refusal(arm: Arm, rows: Iterable[ResultRow]) -> str:
    """Returns why the arm does not run; "" if it does."""
    reasons = (row.reason for row in rows if row.trial.arm == arm.name and row.status == REFUSED)
    return arm.refused or next(reasons, "")


def remaining(
    arm: Arm,
    rows: Sequence[ResultRow],
    seeds: Sequence[int],
    sweep: Sweep,
    timed: bool,
    measure: str,
) -> list[Trial]:
    """Returns the arm's trials that can run now.

    Args:
        arm: the arm.
        rows: the results so far, of all arms.
        seeds: the first is the sweep's.
        sweep: how learning rates are chosen.
        timed: whether a trial that times a step comes first.
        measure: "loss", or the metric that decides.
    """
    rows = [row for row in rows if row.trial.arm == arm.name]
    if refusal(arm, rows):
        return []
    if arm.lr is None:
        return [] if rows else [Trial(arm.name, UNTRAINED, None, seeds[0])]
    if timed and not any(row.trial.stage == TIMING for row in rows):
        return [Trial(arm.name, TIMING, arm.lr, seeds[0])]
    scores = sweep_scores(arm.name, rows, measure)
    if missing := [lr for lr in sweep.first(arm) if lr not in scores]:
        return [Trial(arm.name, SWEEP, lr, seeds[0]) for lr in missing]
    if (further := sweep.next(arm, scores)) is not None:
        return [Trial(arm.name, SWEEP, further, seeds[0])]
    if (best := best_rate(scores)) is None:
        return []
    done = {(row.trial.lr, row.trial.seed) for row in rows}
    return [Trial(arm.name, SEED, best, seed) for seed in seeds if (best, seed) not in done]


def expected(
    arm: Arm,
    rows: Sequence[ResultRow],
    seeds: Sequence[int],
    sweep: Sweep,
    timed: bool,
    measure: str,
) -> int:
    """Returns about how many trials the arm still has to run; the arguments are `remaining`'s."""
    now = remaining(arm, rows, seeds, sweep, timed, measure)
    if not now or arm.lr is None:
        return len(now)
    later = 0 if now[0].stage == SEED else len(seeds) - 1
    if now[0].stage == TIMING:
        later += len(sweep.first(arm))
    return len(now) + later


def rows_at_best_rate(arm: str, rows: Iterable[ResultRow], measure: str) -> list[ResultRow]:
    """Returns the arm's rows at its best learning rate by the measure, one for each seed.

    For an arm that does not train, returns its only row.
    """
    rows = [
        row
        for row in rows
        if row.trial.arm == arm and row.trial.stage != TIMING and row.status != REFUSED
    ]
    best = best_rate(sweep_scores(arm, rows, measure))
    return [
        row
        for row in rows
        if row.trial.lr == best and (best is not None or row.trial.stage == UNTRAINED)
    ]
