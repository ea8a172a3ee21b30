"""What the trials show: differences with intervals, equivalence, ranks over tasks.

A difference of two arms on one task is `paired_difference` of `lorakin compare`: by seed, on the same
rows, with an interval over other seeds and other rows. Over several tasks it is the mean of the
tasks' differences in points; their errors are independent, so the half widths add as squares.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from benchmarks.claims.bleu import WrittenRow
from benchmarks.claims.tasks import Task
from lorakin.compare.arms import PLAIN
from lorakin.compare.estimates import CONFIDENCE, Estimate, holm
from lorakin.compare.prior import BETTER, SAME, WORSE
from lorakin.compare.report_answers import LOSS, ReportAnswers, sign_of
from lorakin.compare.results import ResultRow
from lorakin.compare.standings import Standing, paired_difference
from lorakin.training.metrics import METRICS

UNKNOWN = "not told apart"
"""What an interval shows that shows none of the prior's verdicts."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an arm is ahead of another, in points or, for a loss, in nats.

    Attributes:
        mean: positive where the first is better.
        half: half the width of the 95 % interval.
        margin: what counts as a difference: a point, or 0.02 nats.
        p: the p-value against 0.
        seeds, rows: how many the interval covers.
    """

    mean: float
    half: float
    margin: float
    p: float
    seeds: int
    rows: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half

    @property
    def verdict(self) -> str:
        """What the interval shows.

        "the same": it lies within ± the margin. That is a test of equivalence at 2.5 % on each
        side, which is stricter than the usual one (Schuirmann 1987: two tests at 5 %).
        """
        if self.low > -self.margin and self.high < self.margin:
            return SAME
        if self.low > 0:
            return BETTER
        return WORSE if self.high < 0 else UNKNOWN

    @property
    def is_no_worse(self) -> bool:
        """Whether the interval leaves out being worse by the margin."""
        return self.low > -self.margin


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A task and where its arms stand.

    Attributes:
        task: the task.
        standings: arm → where it stands.
        written: what adapters wrote to the prompts of the reported rows, where that was looked at.
        sweeps: arm → learning rate → the figure on the tuning rows that rates are chosen by.
        reported: the same on the rows to report on, by the measure, which chose nothing.
    """

    task: Task
    standings: Mapping[str, Standing]
    written: Sequence[WrittenRow] = ()
    sweeps: Mapping[str, Mapping[float, float]] = dataclasses.field(default_factory=dict)
    reported: Mapping[str, Mapping[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def unit(self) -> float:
        """A point in the measure: 0.01, or 1 for a loss in nats."""
        return 1.0 if self.task.measure == LOSS else 0.01

    def difference(self, name: str, other: str = "lora") -> Difference | None:
        """Returns how far an arm is ahead of another; None if that has no interval."""
        if name not in self.standings or other not in self.standings:
            return None
        rows, others = self.standings[name].rows, self.standings[other].rows
        found = paired_difference(rows, others, self.task.measure)
        return self._in_units(found)

    def on_own_rows(self, name: str, other: str = "lora") -> Difference | None:
        """Returns the difference on GLUE's held-out rows alone; None elsewhere or without one."""
        if not self.task.added or name not in self.standings:
            return None
        return self._in_units(
            paired_difference(self._own[name], self._own[other], self.task.measure)
        )

    @functools.cached_property
    def _own(self) -> dict[str, list[ResultRow]]:
        return {
            name: [without_first(row, self.task.added, self.task.measure) for row in standing.rows]
            for name, standing in self.standings.items()
        }

    def _in_units(self, found: Estimate | None) -> Difference | None:
        if found is None or math.isinf(found.half_width):
            return None
        return Difference(
            found.mean / self.unit,
            found.half_width / self.unit,
            self.task.target / self.unit,
            found.p,
            found.count,
            found.rows,
        )

    def quality(self, name: str) -> float:
        """Returns an arm's mean figure, higher for the better one; NaN without runs."""
        standing = self.standings.get(name)
        if standing is None or standing.quality is None:
            return math.nan
        return sign_of(self.task.measure) * standing.quality.mean / self.unit


def without_first(row: ResultRow, count: int, measure: str) -> ResultRow:
    """Returns a run of a classifier as if its first `count` rows had not been reported on."""
    if row.answers is None:
        return row
    found = row.answers
    kept = ReportAnswers(found.losses[count:], [], found.right[count:], found.given[count:])
    value = METRICS[measure].of(*kept.numbers, np.ones(len(kept.losses)))
    return dataclasses.replace(row, answers=kept, report={measure: value})


def over_tasks(differences: Sequence[Difference]) -> Difference:
    """Returns the mean of differences on several tasks, in one unit."""
    count = len(differences)
    mean = float(np.mean([d.mean for d in differences]))
    half = math.hypot(*(d.half for d in differences)) / count
    # The p-value of a normal variable with this interval.
    z = abs(mean) / half * stats.norm.isf(0.025) if half else math.inf
    return Difference(
        mean, half, max(d.margin for d in differences), float(2 * stats.norm.sf(z)),
        min(d.seeds for d in differences), sum(d.rows for d in differences),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Judged:
    """An arm beside LoRA, as one of several that were looked at.

    Attributes:
        difference: how far it is ahead.
        p: a method's p-value against 0, corrected for the number of methods; None for other arms.
    """

    difference: Difference
    p: float | None

    @property
    def verdict(self) -> str:
        """What the interval shows; a difference counts only if the corrected p-value says so too."""
        found = self.difference.verdict
        by_chance = self.p is not None and self.p >= 1 - CONFIDENCE
        return UNKNOWN if by_chance and found in (BETTER, WORSE) else found


def judged_together(e: Evidence, methods: Sequence[str]) -> dict[str, Judged]:
    """Returns how a task's arms that have intervals stand beside LoRA; Holm counts the methods."""
    found = {name: e.difference(name) for name in e.standings if name != PLAIN}
    known = {name: d for name, d in found.items() if d is not None}
    p = holm({name: d.p for name, d in known.items() if name in methods})
    return {name: Judged(d, p.get(name)) for name, d in known.items()}


def ranks(evidence: Sequence[Evidence], names: Sequence[str]) -> dict[str, float]:
    """Returns each arm's mean rank over the tasks; 1 is the best."""
    table = np.array([[-e.quality(name) for name in names] for e in evidence])
    mean = stats.rankdata(table, axis=1).mean(axis=0)
    return dict(zip(names, (float(x) for x in mean), strict=True))


def critical_difference(arms: int, tasks: int) -> float:
    """Returns the difference of mean ranks that Nemenyi's test sees at 5 %.

    Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets (JMLR 7, 2006), 3.2.2.

    >>> round(critical_difference(arms=5, tasks=30), 3)  # there: q = 2.728 for five
    1.114
    """
    q = stats.studentized_range.isf(0.05, arms, np.inf) / math.sqrt(2)
    return float(q * math.sqrt(arms * (arms + 1) / (6 * tasks)))
