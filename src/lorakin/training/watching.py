"""When a run evaluates on its held-out rows, which step is its best, and when it stops early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import transformers

from lorakin.errors import SettingError
from lorakin.family.settings import require
from lorakin.training import processes, schedules
from lorakin.training.metrics import METRICS, check_metric
from lorakin.training.requests import PAUSE, STOP, asked
from lorakin.training.run import LOSS, Ending, PreparedRun

SCORE: Final = "eval_score"
"""The name of the number by which the Trainer finds the best step; see `score_of`."""
TIE = 1e-9
"""How much of the loss is in a score."""
STEPS_BETWEEN = 10
"""Steps after which several processes look whether something is asked: they do so together."""
KEPT_CHECKPOINTS = 2
"""How many checkpoints a run keeps, besides the best one."""


class EvaluateLastStep(transformers.TrainerCallback):
    """A Trainer callback that lets the last step be evaluated, whatever the interval is."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for an evaluation at the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class EarlyStopping(transformers.EarlyStoppingCallback):
    """transformers' early stopping, without its advice to keep the best step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Does nothing: `--keep` says what is kept."""


class Requests(transformers.TrainerCallback):
    """A Trainer callback that does what is asked of a run, after the step that it is at.

    Attributes:
        out: the run's directory.
        evaluates: whether the run evaluates while it trains, so that its last step may be the best.
        is_paused: whether the run writes a checkpoint and ends, to be resumed.
    """

    def __init__(self, out: Path, evaluates: bool) -> None:
        self.out, self.evaluates = out, evaluates
        self.is_paused = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks whether something is asked."""
        is_last = state.global_step >= state.max_steps
        if is_last or (processes.count() > 1 and state.global_step % STEPS_BETWEEN):
            return
        request = processes.agreed(asked(self.out))
        if request == STOP:
            control.should_training_stop = True
            control.should_evaluate = control.should_evaluate or self.evaluates
            control.should_save = control.should_save or self.evaluates
        elif request == PAUSE:
            control.should_save = self.is_paused = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a run that pauses; the checkpoint does not say so, since the run is to go on."""
        if self.is_paused:
            control.should_training_stop = True


def evaluation_interval(run: PreparedRun) -> int | None:
    """Returns the steps between two evaluations, None if only the end is evaluated.

    Whoever wants evaluations and does not say how often gets one with each checkpoint.
    """
    recipe = run.recipe
    watches = (
        recipe.keep == "best" or recipe.early_stopping or recipe.schedule in schedules.WATCHERS
    )
    return recipe.eval_every or (run.checkpoint_interval if watches else None)


def deciding_metric(run: PreparedRun) -> tuple[str, bool]:
    """Returns the figure that says which step is best, and whether more of it is better."""
    task, recipe = run.task, run.recipe
    # Schedules that follow a figure follow the loss.
    first = LOSS if recipe.schedule in schedules.WATCHERS else (*task.metrics, LOSS)[0]
    name = recipe.metric or first
    return name, name != LOSS and METRICS[name].higher_is_better


def score_of(run: PreparedRun, figures: Mapping[str, float]) -> dict[str, float]:
    """Returns the number by which the Trainer finds the best step, under its name.

    It is the deciding figure; of two steps at which that is equal, the lower loss is better. Two
    different shares of rows differ by far more than what the loss adds.

    Args:
        run: what `prepare` made.
        figures: the held-out figures at a step, named as in the metrics.
    """
    name, higher = deciding_metric(run)
    value, loss = figures[f"eval_{name}"], figures["eval_loss"]
    if name == LOSS or not math.isfinite(loss):
        return {SCORE: value}
    tie = TIE * loss / (1 + abs(loss))
    return {SCORE: value - tie if higher else value + tie}


def check_reporters(names: Sequence[str]) -> None:
    """Checks that the packages to report to are there.

    Raises:
        SettingError: one is not.
    """
    for name in names:
        require(
            getattr(transformers.integrations, f"is_{name}_available")(),
            f"--report-to {name} needs the package {name}, which is not installed: "
            f"pip install {name}",
        )


def check(run: PreparedRun) -> None:
    """Checks that a run evaluates where its recipe needs it.

    Raises:
        SettingError: evaluations that the recipe's schedule, `keep` or `early_stopping` lack.
    """
    recipe, interval = run.recipe, evaluation_interval(run)
    check_metric(recipe.metric, run.task.metrics, run.task.word)
    metric, _ = deciding_metric(run)
    within = 0 if interval is None else run.total_steps // interval
    schedules.check_evaluations(recipe.schedule, recipe.schedule_args, within)
    if recipe.schedule in schedules.WATCHERS and metric != LOSS:
        raise SettingError(
            f"schedule {recipe.schedule} follows the held-out loss, so --metric {metric} cannot "
            "decide beside it: give --metric loss, or another --schedule"
        )
    if recipe.keep == "best" and recipe.save_every not in (None, interval):
        raise SettingError(
            f"--keep best writes a checkpoint at each evaluation, every {interval} steps, so "
            f"--save-every {recipe.save_every} contradicts it: leave --save-every out"
        )
    patience = recipe.early_stopping or 0
    before_end = 0 if interval is None else (run.total_steps - 1) // interval
    require(
        not patience or before_end > patience,
        f"--early-stopping {patience} could never stop this run, which has {before_end} "
        "evaluations before its end: give a smaller --eval-every or a smaller number",
    )


def arguments(run: PreparedRun) -> dict[str, Any]:
    """Returns the arguments of transformers' `TrainingArguments` for evaluations."""
    interval, (_, higher) = evaluation_interval(run), deciding_metric(run)
    if interval is None:
        return {"eval_strategy": "no", "save_total_limit": KEPT_CHECKPOINTS}
    return {
        "save_total_limit": KEPT_CHECKPOINTS + 1,
        "eval_strategy": "steps",
        "eval_steps": interval,
        "metric_for_best_model": SCORE,
        "greater_is_better": higher,
        "load_best_model_at_end": run.recipe.keep == "best",
        # How many evaluations were no better, and whether that was the end.
        "restore_callback_states_from_checkpoint": True,
    }


def callbacks(run: PreparedRun) -> list[transformers.TrainerCallback]:
    """Returns the Trainer's callbacks for evaluations."""
    if evaluation_interval(run) is None:
        return []
    patience = run.recipe.early_stopping
    stopping = [] if patience is None else [EarlyStopping(patience)]
    return [EvaluateLastStep(), *stopping]


def ending(run: PreparedRun, state: transformers.TrainerState) -> Ending:
    """Returns how a run's training ended, from the Trainer's state."""
    best = state.best_global_step if run.recipe.keep == "best" else None
    return Ending(state.global_step, run.total_steps, best, deciding_metric(run)[0])
