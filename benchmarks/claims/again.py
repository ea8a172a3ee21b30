"""Runs one cell of the study again, and says whether it lands where the committed rows say.

A cell is an arm on a task at its chosen rate. A seed that the study had gives the same run, to
rounding, on the same versions; a new one is expected, with 95 % probability, within

    mean ± t · s · √(1 + 1/n)

of the n seeds of the committed rows, with s their standard deviation and t Student's.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from scipy import stats

from benchmarks.claims import archive
from benchmarks.claims.evidence import evidence_of
from benchmarks.claims.study import comparison_of, prepared, restore
from benchmarks.claims.tasks import Task
from lorakin.compare import trial
from lorakin.compare.directory import locked
from lorakin.compare.results import DONE, SEED, Trial


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell that was run again: its figure, and where it was expected."""

    task: str
    arm: str
    seed: int
    value: float
    low: float
    high: float
    before: float | None

    @property
    def lands(self) -> bool:
        """Whether the figure lies where it was expected."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        """Says how it went in one line."""
        known = "" if self.before is None else f"; the same seed gave {self.before:.4f} before"
        where = "inside" if self.lands else "OUTSIDE"
        return (
            f"{self.task}, {self.arm}, seed {self.seed}: {self.value:.4f}, {where} "
            f"{self.low:.4f} to {self.high:.4f}{known}"
        )


def expected(values: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of the 95 % interval in which one more value is expected.

    >>> low, high = expected([0.80, 0.81, 0.82, 0.80, 0.82])
    >>> round(low, 3), round(high, 3)
    (0.78, 0.84)
    """
    count, mean = len(values), statistics.fmean(values)
    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values)
    return mean - half * math.sqrt(1 + 1 / count), mean + half * math.sqrt(1 + 1 / count)


def run_again(task: Task, arm: str, seed: int, data: str) -> Cell:
    """Trains a cell in a new directory, and returns how it went.

    Raises:
        SystemExit: the archive has no such arm, or the run failed.
    """
    kept = archive.load(task.name)
    standings = evidence_of(task, kept).standings
    if arm not in standings or standings[arm].lr is None:
        raise SystemExit(f"no arm {arm!r} that trains; there are: {', '.join(standings)}")
    before = {row.trial.seed: (row.report or {})[task.measure] for row in standings[arm].done}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        # Which modules an arm draws at random follows from the trials of LoRA-drop.
        restore(task, data, out, Console(quiet=True))
        with locked(comparison_of(task, data, out)):
            run = prepared(task, data, out, Console(quiet=True))
            job = run.trial_job(Trial(arm, SEED, standings[arm].lr, seed), "cpu", threads=1)
            row = trial.run(job)
    if row.status != DONE or row.report is None:
        raise SystemExit(f"the run {row.status}: {row.reason}")
    low, high = expected(list(before.values()))
    return Cell(task.name, arm, seed, row.report[task.measure], low, high, before.get(seed))
