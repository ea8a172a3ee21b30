"""Computes where the arms of a comparison stand: means, intervals, differences from plain LoRA.

All figures are taken on the report rows, which no learning rate was chosen by. Intervals are
Student's t over the seeds. Two arms are compared seed by seed, because runs with the same seed saw
the same rows in the same order. The p-value of that paired t-test is corrected by Holm's procedure
for the number of methods: of twenty equal methods, one is expected to pass at 5 % by chance.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from scipy import stats

from lorakin.compare import next_trials
from lorakin.compare.arms import BASE, MEMBER, Arm
from lorakin.compare.results import DIVERGED, DONE, FAILED, TIMING, ResultRow

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval and a test against zero.

    Attributes:
        mean: the mean over the seeds.
        half_width: half the width of the interval; infinite for one seed.
        count: the number of seeds.
        p: two-sided p-value of Student's t-test of the mean against 0; 1 for one seed.
    """

    mean: float
    half_width: float
    count: int
    p: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Returns the estimate from the values, one for each seed; there is at least one.

        >>> estimate = Estimate.of([1.0, 2.0, 3.0])
        >>> f"{estimate.mean:.1f} ± {estimate.half_width:.3f}, p = {estimate.p:.3f}"
        '2.0 ± 2.484, p = 0.074'
        """
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return cls(mean, math.inf, count, 1.0)
        if len(set(values)) == 1:  # scipy's test divides by their spread
            return cls(mean, 0.0, count, 0.0 if mean else 1.0)
        with warnings.catch_warnings():
            # scipy warns of values that differ by a rounding error.
            warnings.simplefilter("ignore", RuntimeWarning)
            test = stats.ttest_1samp(values, 0.0)
        low, high = test.confidence_interval(CONFIDENCE)
        return cls(mean, float(high - low) / 2, count, float(test.pvalue))

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half_width

    def as_dict(self) -> dict[str, float | int | None]:
        """Returns the estimate for `--json`."""
        half_width = self.half_width if math.isfinite(self.half_width) else None
        return {"mean": self.mean, "half_width": half_width, "seeds": self.count}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A time or memory as a multiple of plain LoRA's.

    Attributes:
        median: the median of the arm's runs over the median of plain LoRA's.
        low, high: the lowest and the highest of the arm's runs over the same median.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], reference: Sequence[float]) -> Ratio | None:
        """Returns the ratio; None if one of the two has no positive value.

        >>> Ratio.of([2.0, 4.0, 3.0], [1.0, 2.0, 30.0])
        Ratio(median=1.5, low=1.0, high=2.0)
        """
        positive = [x for x in values if x > 0]
        reference = [x for x in reference if x > 0]
        if not positive or not reference:
            return None
        unit = statistics.median(reference)
        return cls(statistics.median(positive) / unit, min(positive) / unit, max(positive) / unit)


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where one arm stands.

    Attributes:
        arm: the arm.
        rows: its runs at its best learning rate.
        failed_trials: its trials that diverged or failed, at any rate.
        refused: why it cannot run; empty if it can.
        lr: its best learning rate.
        at_edge: whether the best rate is the lowest or highest that was tried.
        quality: loss or accuracy on the report rows.
        ahead: how much better it is than plain LoRA; positive is better for loss and accuracy.
        p: the corrected p-value of `ahead`.
        share: the part of plain LoRA's improvement over the base that it reaches; None if that
            improvement is within the noise.
        time: the time of a step, as a multiple of plain LoRA's.
        memory: the memory that training added, as a multiple of plain LoRA's.
    """

    arm: Arm
    rows: list[ResultRow]
    failed_trials: list[ResultRow]
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
        """The number of trained parameters; None if no run has figures."""
        return self.done[0].trained if self.done else None

    @property
    def kind(self) -> str:
        """The arm's kind."""
        return self.arm.kind

    def as_dict(self) -> dict[str, Any]:
        """Returns the standing for `--json`."""
        return {
            "arm": self.arm.name,
            "title": self.arm.title,
            "kind": self.arm.kind,
            "method": self.arm.words,
            "refused": self.refused or None,
            "learning_rate": self.lr,
            "at_the_edge_of_the_sweep": self.at_edge,
            "quality": self.quality and self.quality.as_dict(),
            "ahead_of_plain": self.ahead and self.ahead.as_dict(),
            "p": self.p if self.ahead is not None else None,
            "share_of_improvement": self.share,
            "trainable_parameters": self.trained,
            "frozen_parameters": self.done[0].frozen if self.done else None,
            "adapter_bytes": self.done[0].adapter_bytes if self.done else None,
            "time_ratio": self.time and dataclasses.asdict(self.time),
            "memory_ratio": self.memory and dataclasses.asdict(self.memory),
            "seeds": len(self.done),
            "diverged": sum(row.status == DIVERGED for row in self.failed_trials),
            "failed": sum(row.status == FAILED for row in self.failed_trials),
        }


def standings_of(arms: Sequence[Arm], rows: Sequence[ResultRow], measure: str) -> list[Standing]:
    """Returns where each arm stands, in the order of the arms.

    Args:
        arms: the first is plain LoRA.
        rows: the results.
        measure: "loss" (less is better) or "accuracy" (more is better).
    """
    sign = sign_of(measure)
    reference = next_trials.rows_at_best_rate(arms[0].name, rows)
    plain = _values(reference, measure)
    base = _mean(_values(next_trials.rows_at_best_rate(BASE, rows), measure))
    total = None  # plain LoRA's improvement over the base
    if base is not None and plain:
        improvement = Estimate.of([sign * (value - base) for value in plain.values()])
        if improvement.mean > 0 and improvement.excludes_zero:
            total = improvement.mean

    result = []
    for arm in arms:
        best = next_trials.rows_at_best_rate(arm.name, rows)
        standing = _standing(arm, best, rows, measure)
        if standing.quality is not None and total is not None and base is not None:
            share = sign * (standing.quality.mean - base) / total
            standing = dataclasses.replace(standing, share=share)
        result.append(
            dataclasses.replace(
                standing,
                ahead=None if arm is arms[0] else paired_difference(best, reference, measure),
                time=Ratio.of(_figures(best, "step_work"), _figures(reference, "step_work")),
                memory=Ratio.of(_figures(best, "peak_bytes"), _figures(reference, "peak_bytes")),
            )
        )
    return _corrected(result)


def _standing(arm: Arm, best: list[ResultRow], rows: Sequence[ResultRow], measure: str) -> Standing:
    """Returns the standing of an arm, without what compares it with plain LoRA."""
    losses, values = next_trials.sweep_losses(arm.name, rows), _values(best, measure)
    best_rate, rates = next_trials.best_rate(losses), sorted(losses)
    return Standing(
        arm=arm,
        rows=best,
        failed_trials=[
            row for row in rows if row.trial.arm == arm.name and row.status in (DIVERGED, FAILED)
        ],
        refused=next_trials.refusal(arm, rows),
        lr=best_rate,
        at_edge=best_rate is not None and best_rate in (rates[0], rates[-1]),
        quality=Estimate.of(list(values.values())) if values else None,
    )


def _corrected(standings: Sequence[Standing]) -> list[Standing]:
    """Sets the p-values; those of methods are corrected for their number."""
    raw = {s.arm.name: s.ahead.p for s in standings if s.ahead is not None}
    members = {s.arm.name: raw[s.arm.name] for s in standings if s.kind == MEMBER and s.ahead}
    p = raw | holm(members)
    return [dataclasses.replace(s, p=p.get(s.arm.name, 1.0)) for s in standings]


def sign_of(measure: str) -> float:
    """Returns 1 if more of the measure is better, −1 if less is."""
    return 1.0 if measure == "accuracy" else -1.0


def paired_difference(
    rows: Sequence[ResultRow], others: Sequence[ResultRow], measure: str
) -> Estimate | None:
    """Returns how much better `rows` are than `others`, paired by seed.

    None: no seed has a finished run in both.
    """
    values, references = _values(rows, measure), _values(others, measure)
    seeds = sorted(values.keys() & references.keys())
    if not seeds:
        return None
    return Estimate.of([sign_of(measure) * (values[seed] - references[seed]) for seed in seeds])


def leaders(standings: Sequence[Standing]) -> list[Standing]:
    """Returns the methods that beat plain LoRA by more than the noise, the best first."""
    ahead = [
        (s.ahead.mean, s)
        for s in standings
        if s.kind == MEMBER and s.ahead and s.ahead.mean > 0 and s.p < 1 - CONFIDENCE
    ]
    return [s for _, s in sorted(ahead, key=lambda pair: -pair[0])]


def holm(values: dict[str, float]) -> dict[str, float]:
    """Corrects p-values for their number by Holm's procedure (Scand. J. Statist. 6, 1979).

    scipy has no such function.

    >>> holm({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    corrected, least = {}, 0.0
    for position, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(values) - position) * p))
        corrected[name] = least
    return corrected


def measure_of(rows: Sequence[ResultRow]) -> str:
    """Returns what is compared: "accuracy" for classifiers, else "loss"."""
    return "accuracy" if any(row.report and "accuracy" in row.report for row in rows) else "loss"


def _values(rows: Sequence[ResultRow], measure: str) -> dict[int, float]:
    """Returns seed → measure on the report rows, for runs that ended well."""
    values = {
        row.trial.seed: (row.report or {}).get(measure, math.nan)
        for row in rows
        if row.status == DONE
    }
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def _figures(rows: Sequence[ResultRow], name: str) -> list[float]:
    return [getattr(row, name) for row in rows if row.status == DONE and row.trial.stage != TIMING]


def _mean(values: dict[int, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None
