"""A comparison that is ready to run: its arms, its data, and the results so far.

Its whole state is the results file. What to run next follows from the rows in it (`next_trials`),
so the same command resumes a comparison that was killed. `workers` runs the trials.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from lorakin.compare import next_trials, split, trial
from lorakin.compare.arms import BASE, FULL, Arm
from lorakin.compare.comparison import LEAST_STEPS, Comparison
from lorakin.compare.directory import DATA, TRIALS
from lorakin.compare.report_answers import LOSS
from lorakin.compare.results import DONE, FAILED, REFUSED, SEED, TIMING, ResultRow, Results, Trial
from lorakin.errors import SettingError
from lorakin.training.recipe import Recipe
from lorakin.training.tasks import kind_of_task


@dataclasses.dataclass
class PreparedComparison:
    """A comparison that is ready to run, or to be reported.

    Attributes:
        comparison: its options.
        out: its directory.
        arms: the arms; plain LoRA is the first.
        parts: how the data was split.
        results: the rows so far.
        dtype: the dtype of the base model, such as "bfloat16".
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

    @property
    def measure(self) -> str:
        """What decides: the chosen metric, else the task's first, else the loss."""
        first = next(iter(kind_of_task(self.parts.task_word).metrics), LOSS)
        return self.comparison.metric or first

    def remaining(self) -> list[Trial]:
        """Returns the trials that can run now, sweeps before further seeds."""
        trials = [
            trial
            for arm in self.arms
            for trial in next_trials.remaining(arm, self.results.rows, *self._how_chosen)
        ]
        return sorted(trials, key=lambda t: (t.stage == SEED, len(self._rows(t.arm))))

    def expected(self) -> int:
        """Returns about how many trials are left."""
        return sum(
            next_trials.expected(arm, self.results.rows, *self._how_chosen) for arm in self.arms
        )

    @property
    def _how_chosen(self) -> tuple[list[int], next_trials.Sweep, bool, str]:
        """The seeds, the sweep, whether each arm is timed first, and what decides."""
        options = self.comparison
        return self.seeds, options.parsed_sweep, options.parsed_budget.steps is None, self.measure

    def steps(self, arm: str) -> int:
        """Returns the steps of the arm's trials; before it is timed, the steps of the timing."""
        budget = self.comparison.parsed_budget
        if budget.steps is not None:
            return budget.steps
        timings = (row for row in self._rows(arm) if row.trial.stage == TIMING)
        timing = next(timings, None)
        if timing is None or not timing.step_seconds:
            return trial.TIMED_STEPS
        return budget.steps_in(timing.step_seconds)

    def trial_job(self, next_trial: Trial, device: str, threads: int) -> trial.TrialJob:
        """Returns what the trial's process needs to know."""
        arm = next(arm for arm in self.arms if arm.name == next_trial.arm)
        steps = trial.TIMED_STEPS if next_trial.stage == TIMING else self.steps(arm.name)
        fields = {**self.comparison.recipe, "dtype": self.dtype, **arm.recipe}
        # The parts are written in their format's own columns.
        fields |= {"columns": {}, "format": self.parts.format, "task": self.parts.task}
        recipe = Recipe(
            model=self.comparison.model,
            data=[str(self.out / DATA / split.TRAIN)],
            eval_data=str(self.out / DATA / split.TUNE),
            out=str(self.out / TRIALS / next_trial.name),
            method=arm.words,
            settings=arm.settings(steps),
            lr=next_trial.lr,
            steps=steps,
            seed=next_trial.seed,
            save_every=0,
            labels=self.parts.labels,
            **fields,
        )
        return trial.TrialJob(
            trial=next_trial,
            recipe=recipe,
            report_data=str(self.out / DATA / split.REPORT),
            device=device,
            threads=threads,
            keep=arm.name not in (FULL, BASE) and next_trial.stage != TIMING,
        )

    def record_result(self, row: ResultRow) -> None:
        """Records how a trial ended, and deletes adapters that are no longer their arm's best."""
        if row.trial.stage == TIMING and row.status == DONE:
            row = self._with_enough_steps(row)
        self.results.add(row)

        rows = self._rows(row.trial.arm)
        at_best = next_trials.rows_at_best_rate(row.trial.arm, rows, self.measure)
        best = {row.trial.name for row in at_best}
        for other in rows:
            if other.trial.name not in best:
                shutil.rmtree(self.out / TRIALS / other.trial.name, ignore_errors=True)

    def _with_enough_steps(self, timing: ResultRow) -> ResultRow:
        """Refuses an arm whose steps are too slow for the budget."""
        steps = self.comparison.parsed_budget.steps_in(timing.step_seconds)
        if steps >= LEAST_STEPS:
            return timing
        why = (
            f"the budget fits no trial: a step takes {timing.step_seconds:.3g} s, so "
            f"{self.comparison.budget} is {steps} steps"
        )
        return dataclasses.replace(timing, status=REFUSED, reason=why)

    def _rows(self, arm: str) -> list[ResultRow]:
        return [row for row in self.results.rows if row.trial.arm == arm]


def check_anything_ran(comparison_run: PreparedComparison) -> None:
    """Checks that at least one arm that trains could run.

    Raises:
        SettingError: each such arm was refused, or all its trials failed.
    """
    trained = (arm for arm in comparison_run.arms if arm.lr is not None)
    reasons = [_failure(arm, comparison_run.results.rows) for arm in trained]
    if all(reasons):
        raise SettingError(f"nothing could be run: {reasons[0]}")


def _failure(arm: Arm, rows: Sequence[ResultRow]) -> str:
    """Returns why no trial of the arm has run to its end; "" if one has or still can."""
    rows = [row for row in rows if row.trial.arm == arm.name]
    if refused := next_trials.refusal(arm, rows):
        return refused
    failed = bool(rows) and all(row.status == FAILED for row in rows)
    return f"every trial of {arm.title} failed: {rows[0].reason}" if failed else ""
