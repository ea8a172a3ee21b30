"""Where the arms of a comparison stand: means and intervals over seeds, and differences from plain LoRA, seed by seed.

Every figure is taken on the report rows, which no learning rate was chosen by. Intervals are Student's t over the seeds. A
difference is taken between runs of the same seed, which saw the same rows in the same order; its p-value, of a paired t-test,
is corrected over all methods by Holm's procedure, since of twenty comparisons of equals one is expected to pass at 5 %.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

from lorakin.compare import arms as arms_
from lorakin.compare import schedule
from lorakin.compare.arms import Arm
from lorakin.compare.results import DIVERGED, DONE, FAILED, TIMING, ResultRow

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95 % interval, which is infinite of one value."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From the values, one a seed; there is at least one."""
        count = len(values)
        if count < 2:
            return cls(values[0], math.inf, count)
        spread = statistics.stdev(values) / math.sqrt(count)
        return cls(
            statistics.fmean(values),
            float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread,
            count,
        )

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half

    @property
    def p(self) -> float:
        """Of Student's t-test of the mean against 0, two-sided."""
        if self.count < 2:
            return 1.0
        if self.half == 0:
            return 0.0 if self.mean else 1.0
        t = self.mean / self.half * float(stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1))
        return float(2 * stats.t.sf(abs(t), self.count - 1))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio to plain LoRA: the median over the runs, and the lowest and highest of the arm over the reference's median."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, mine: Sequence[float], reference: Sequence[float]) -> Ratio | None:
        """None where either is not known."""
        known, other = [x for x in mine if x > 0], [x for x in reference if x > 0]
        if not known or not other:
            return None
        base = statistics.median(other)
        return cls(statistics.median(known) / base, min(known) / base, max(known) / base)


@dataclasses.dataclass(frozen=True)
class Standing:
    """One arm.

    `rows` are its runs at its best learning rate `lr`, `ended` those of all its trials that did not end well. `quality` is the
    loss or the accuracy on the report rows; `ahead` how much better than plain LoRA it is, positive whichever way the measure
    goes, and `p` its corrected p-value; `share` the part of plain LoRA's improvement over the base that it reaches, None if
    that is not beyond the noise. `at_edge`: no rate on one side of the best was tried.
    """

    arm: Arm
    rows: list[ResultRow]
    ended: list[ResultRow]
    refused: str
    lr: float | None
    at_edge: bool
    quality: Estimate | None = None
    ahead: Estimate | None = None
    p: float = 1.0
    share: float | None = None
    time: Ratio | None = None
    memory: Ratio | None = None

    @property
    def done(self) -> list[ResultRow]:
        """The runs that have figures."""
        return [row for row in self.rows if row.status == DONE]

    @property
    def trained(self) -> int | None:
        """How many numbers it trains."""
        return self.done[0].trained if self.done else None

    @property
    def kind(self) -> str:
        """Its arm's."""
        return self.arm.kind

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "arm": self.arm.name,
            "title": self.arm.title,
            "kind": self.arm.kind,
            "method": self.arm.words,
            "refused": self.refused or None,
            "learning_rate": self.lr,
            "at_the_edge_of_the_sweep": self.at_edge,
            "quality": _interval(self.quality),
            "ahead_of_plain": _interval(self.ahead),
            "p": self.p if self.ahead is not None else None,
            "share_of_improvement": self.share,
            "trainable_parameters": self.trained,
            "frozen_parameters": self.done[0].frozen if self.done else None,
            "adapter_bytes": self.done[0].adapter_bytes if self.done else None,
            "time_ratio": self.time and dataclasses.asdict(self.time),
            "memory_ratio": self.memory and dataclasses.asdict(self.memory),
            "seeds": len(self.done),
            "diverged": sum(row.status == DIVERGED for row in self.ended),
            "failed": sum(row.status == FAILED for row in self.ended),
        }


def standings(arms: Sequence[Arm], rows: Sequence[ResultRow], measure: str) -> list[Standing]:
    """Where every arm stands, in the arms' order.

    Args:
        arms: plain LoRA is the first.
        rows: the results.
        measure: "loss", of which less is better, or "accuracy".
    """
    sign = sign_of(measure)
    reference = schedule.chosen(arms[0].name, rows)
    plain = _values(reference, measure)
    base = _mean(_values(schedule.chosen(arms_.BASE, rows), measure))
    better = (
        None
        if base is None or not plain
        else Estimate.of([sign * (value - base) for value in plain.values()])
    )
    gained = (
        better.mean if better is not None and better.mean > 0 and better.excludes_zero else None
    )
    found = []
    for arm in arms:
        mine = schedule.chosen(arm.name, rows)
        values, losses = _values(mine, measure), schedule.swept(arm.name, rows)
        best, known = schedule.best_rate(losses), sorted(losses)
        mean = _mean(values)
        found.append(Standing(
            arm=arm,
            rows=mine,
            ended=[row for row in rows if row.trial.arm == arm.name and row.status in (DIVERGED, FAILED)],
            refused=schedule.refusal(arm, rows),
            lr=best,
            at_edge=best is not None and best in (known[0], known[-1]),
            quality=Estimate.of(list(values.values())) if values else None,
            ahead=None if arm is arms[0] else apart(mine, reference, measure),
            share=sign * (mean - base) / gained if gained and mean is not None and base is not None else None,
            time=Ratio.of(_figures(mine, "step_work"), _figures(reference, "step_work")),
            memory=Ratio.of(_figures(mine, "peak_bytes"), _figures(reference, "peak_bytes")),
        ))  # fmt: skip
    corrected = holm(
        {s.arm.name: s.ahead.p for s in found if s.kind == arms_.MEMBER and s.ahead is not None}
    )
    return [
        dataclasses.replace(s, p=corrected.get(s.arm.name, s.ahead.p if s.ahead else 1.0))
        for s in found
    ]


def sign_of(measure: str) -> float:
    """What makes more of a measure better."""
    return 1.0 if measure == "accuracy" else -1.0


def apart(rows: Sequence[ResultRow], others: Sequence[ResultRow], measure: str) -> Estimate | None:
    """How far runs are ahead of others, seed by seed, positive if they are better; None if no seed ended well in both."""
    mine, theirs = _values(rows, measure), _values(others, measure)
    both = sorted(mine.keys() & theirs.keys())
    return (
        Estimate.of([sign_of(measure) * (mine[seed] - theirs[seed]) for seed in both])
        if both
        else None
    )


def leaders(found: Sequence[Standing]) -> list[Standing]:
    """The methods that are better than plain LoRA by more than the noise, the best first."""
    ahead = [
        s
        for s in found
        if s.kind == arms_.MEMBER
        and s.ahead is not None
        and s.ahead.mean > 0
        and s.p < 1 - CONFIDENCE
    ]
    return sorted(ahead, key=lambda s: -(s.ahead.mean if s.ahead else 0.0))


def holm(values: dict[str, float]) -> dict[str, float]:
    """p-values corrected for their number, by Holm's procedure (Scand. J. Statist. 6, 1979)."""
    corrected, least = {}, 0.0
    for place, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(values) - place) * p))
        corrected[name] = least
    return corrected


def measure_of(rows: Sequence[ResultRow]) -> str:
    """What is compared: a classifier's accuracy, else the loss."""
    return "accuracy" if any(row.report and "accuracy" in row.report for row in rows) else "loss"


def _values(rows: Sequence[ResultRow], measure: str) -> dict[int, float]:
    """Seed → the measure on the report rows, of runs that ended well."""
    ended = {
        row.trial.seed: (row.report or {}).get(measure, math.nan)
        for row in rows
        if row.status == DONE
    }
    return {seed: value for seed, value in ended.items() if math.isfinite(value)}


def _figures(rows: Sequence[ResultRow], name: str) -> list[float]:
    return [getattr(row, name) for row in rows if row.status == DONE and row.trial.stage != TIMING]


def _mean(values: dict[int, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _interval(estimate: Estimate | None) -> dict[str, float | int | None] | None:
    if estimate is None:
        return None
    return {
        "mean": estimate.mean,
        "half_width": estimate.half if math.isfinite(estimate.half) else None,
        "seeds": estimate.count,
    }
