"""A comparison that is ready to run: its arms, its data, and the results so far.

Its whole state is the results file. What to run next follows from the rows in it (`schedule`), so
a comparison that was killed continues with the same command. `workers` runs the trials.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from lorakin.compare import schedule, split, trial
from lorakin.compare.arms import BASE, FULL, Arm
from lorakin.compare.comparison import LEAST_STEPS, Comparison
from lorakin.compare.directory import DATA, TRIALS
from lorakin.compare.results import DONE, FAILED, REFUSED, SEED, TIMING, ResultRow, Results, Trial
from lorakin.errors import SettingError
from lorakin.training.recipe import Recipe


@dataclasses.dataclass
class Study:
    """A comparison that is ready to run, or to be reported.

    Attributes:
        comparison: what was asked for.
        out: the directory.
        arms: what is compared; plain LoRA is the first.
        parts: how the data was split.
        results: the rows so far.
        dtype: of the base model, such as "bfloat16".
    """

    comparison: Comparison
    out: Path
    arms: list[Arm]
    parts: split.Parts
    results: Results
    dtype: str

    @property
    def seeds(self) -> list[int]:
        """The seeds; all arms have the same."""
        return list(range(self.comparison.seeds))

    def remaining(self) -> list[Trial]:
        """Returns the trials that can run now, sweeps before further seeds."""
        found = [
            trial
            for arm in self.arms
            for trial in schedule.remaining(arm, self.results.rows, *self._plan)
        ]
        return sorted(found, key=lambda t: (t.stage == SEED, len(self._rows(t.arm))))

    def expected(self) -> int:
        """Returns about how many trials are left."""
        return sum(schedule.expected(arm, self.results.rows, *self._plan) for arm in self.arms)

    @property
    def _plan(self) -> tuple[list[int], schedule.Sweep, bool]:
        """Seeds, sweep, and whether each arm is timed first."""
        return self.seeds, self.comparison.sweeps, self.comparison.spent.steps is None

    def steps(self, arm: str) -> int:
        """Returns the steps of the arm's trials; before it is timed, the steps of the timing."""
        budget = self.comparison.spent
        if budget.steps is not None:
            return budget.steps
        timings = (row for row in self._rows(arm) if row.trial.stage == TIMING)
        timing = next(timings, None)
        if timing is None or not timing.step_seconds:
            return trial.TIMED_STEPS
        return budget.steps_in(timing.step_seconds)

    def job(self, what: Trial, device: str, threads: int) -> trial.TrialJob:
        """Returns what the trial's process needs to know."""
        arm = next(arm for arm in self.arms if arm.name == what.arm)
        steps = trial.TIMED_STEPS if what.stage == TIMING else self.steps(arm.name)
        fields = {**self.comparison.recipe, "dtype": self.dtype, **arm.recipe}
        # The parts are written in their format's own columns.
        fields |= {"columns": {}, "format": self.parts.format}
        recipe = Recipe(
            model=self.comparison.model,
            data=[str(self.out / DATA / split.TRAIN)],
            eval_data=str(self.out / DATA / split.TUNE),
            out=str(self.out / TRIALS / what.name),
            method=arm.words,
            settings=arm.settings(steps),
            lr=what.lr,
            steps=steps,
            seed=what.seed,
            save_every=0,
            labels=self.parts.labels,
            **fields,
        )
        return trial.TrialJob(
            trial=what,
            recipe=recipe,
            report_data=str(self.out / DATA / split.REPORT),
            device=device,
            threads=threads,
            keep=arm.name not in (FULL, BASE) and what.stage != TIMING,
        )

    def take(self, row: ResultRow) -> None:
        """Records how a trial ended, and deletes adapters that are no longer their arm's best."""
        if row.trial.stage == TIMING and row.status == DONE:
            row = self._with_enough_steps(row)
        self.results.add(row)

        mine = self._rows(row.trial.arm)
        kept = {row.trial.name for row in schedule.chosen(row.trial.arm, mine)}
        for other in mine:
            if other.trial.name not in kept:
                shutil.rmtree(self.out / TRIALS / other.trial.name, ignore_errors=True)

    def _with_enough_steps(self, timing: ResultRow) -> ResultRow:
        """Refuses an arm whose steps are too slow for the budget."""
        steps = self.comparison.spent.steps_in(timing.step_seconds)
        if steps >= LEAST_STEPS:
            return timing
        why = (
            f"the budget fits no trial: a step takes {timing.step_seconds:.3g} s, so "
            f"{self.comparison.budget} is {steps} steps"
        )
        return dataclasses.replace(timing, status=REFUSED, reason=why)

    def _rows(self, arm: str) -> list[ResultRow]:
        return [row for row in self.results.rows if row.trial.arm == arm]


def check_ran(study: Study) -> None:
    """Checks that at least one arm that trains could run.

    Raises:
        SettingError: each such arm was refused, or all its trials failed.
    """
    reasons = [_why_not(arm, study.results.rows) for arm in study.arms if arm.lr is not None]
    if all(reasons):
        raise SettingError(f"nothing could be run: {reasons[0]}")


def _why_not(arm: Arm, rows: Iterable[ResultRow]) -> str:
    mine = [row for row in rows if row.trial.arm == arm.name]
    if refused := schedule.refusal(arm, mine):
        return refused
    failed = bool(mine) and all(row.status == FAILED for row in mine)
    return f"every trial of {arm.title} failed: {mine[0].reason}" if failed else ""
