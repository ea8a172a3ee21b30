"""A learning-rate range test: a short run whose rate grows from step to step (arXiv 1506.01186)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import transformers
from rich.console import Console

from lorakin.errors import DivergedError, SettingError
from lorakin.family.settings import require
from lorakin.training import train as training
from lorakin.training.metrics_file import running_mean, write_figure
from lorakin.training.recipe import Recipe
from lorakin.training.run_trainer import RunTraining, trainer_of

FEWEST_STEPS = 20
DIVERGED = 4.0
"""The test ends where the smoothed loss is this many times its smallest value."""
CLEAR = 3.0
"""A fall by so many standard deviations of a step's loss is no chance."""
NORMAL_MEDIAN = 0.6745
"""The median of a standard normal variable's size."""
KEPT = 0.8
"""The weight of what came before in the smoothed loss."""


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """The rates of a range test, and the training loss at each.

    >>> losses = [2.0, 2.0, 1.9, 1.5, 1.0, 0.9, 1.2, 3.0]
    >>> round(RangeTest([10.0**n for n in range(-6, 2)], losses, 0.0).suggestion, 6)
    0.001
    """

    rates: Sequence[float]
    losses: Sequence[float]
    kept: float = KEPT

    @property
    def smoothed(self) -> list[float]:
        """The losses as a running mean."""
        return running_mean(self.losses, self.kept)

    @property
    def lowest(self) -> float:
        """The rate at which the smoothed loss is lowest."""
        return self.rates[int(np.argmin(self.smoothed))]

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls fastest, by the logarithm of the rate.

        It lies below the rate of the lowest loss, which is often too high.

        Raises:
            SettingError: the loss falls nowhere, or by no more than it scatters between steps.
        """
        smoothed = self.smoothed
        until = int(np.argmin(smoothed)) + 1
        between = f"between {self.rates[0]:g} and {self.rates[-1]:g}"
        if until < 3:
            raise SettingError(
                f"the loss falls at no rate {between}, so there is none to suggest: begin lower "
                "with --from, or take more --steps"
            )
        fall, scatter = smoothed[0] - smoothed[until - 1], self._scatter()
        if fall < CLEAR * scatter:
            raise SettingError(
                f"the loss falls by {fall:.2g} {between}, and from one step to the next it "
                f"scatters by {scatter:.2g}, so there is no rate to suggest: take more --steps or "
                "a larger --batch-size, or see whether the labels are right"
            )
        slopes = np.gradient(smoothed[:until], np.log(self.rates[:until]))
        return self.rates[int(np.argmin(slopes[:-1]))]

    def _scatter(self) -> float:
        """Returns the standard deviation of a step's loss around a smooth curve.

        From the median of the second differences, to which a straight fall and a few large steps
        add nothing.
        """
        second = np.abs(np.diff(self.losses, n=2))
        return float(np.median(second) / NORMAL_MEDIAN / np.sqrt(6))

    def as_dict(self) -> dict[str, Any]:
        """Returns the test for `--json`."""
        return {
            "suggestion": self.suggestion,
            "lowest": self.lowest,
            "rates": list(self.rates),
            "losses": list(self.losses),
            "smoothed": self.smoothed,
        }

    def plot(self, path: Path) -> None:
        """Draws the loss over the rates.

        Raises:
            OutputError: the picture cannot be written.
        """
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.semilogx(self.rates, self.losses, color="tab:blue", alpha=0.35, label="each step")
        axes.semilogx(self.rates, self.smoothed, color="tab:blue", linewidth=2, label="smoothed")
        axes.axvline(self.suggestion, color="tab:orange", label=f"{self.suggestion:.1e}, steepest")
        axes.set(xlabel="learning rate", ylabel="training loss")
        axes.set_ylim(top=2 * max(self.losses[0], min(self.smoothed)), bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        write_figure(figure, path)


class RangeTraining(RunTraining):
    """Mixed in before a Trainer class: its rate grows by one factor at each step, to `highest`."""

    lr_scheduler: Any

    def __init__(self, *args: Any, highest: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.highest = highest

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Makes the schedule; rates of a method's own groups keep their ratios."""
        super().create_scheduler(num_training_steps, *args, **kwargs)
        whole, last = self.highest / self.args.learning_rate, num_training_steps - 1
        optimizer = self.lr_scheduler.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: whole ** (n / last)
        )
        return self.lr_scheduler


class Recording(transformers.TrainerCallback):
    """A Trainer callback that keeps each step's rate and loss, and ends a run that diverges."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keeps a step's figures."""
        if not logs or "loss" not in logs:
            return
        self.rates.append(float(logs["learning_rate"]))
        self.losses.append(float(logs["loss"]))
        smoothed = running_mean(self.losses, KEPT)
        if smoothed[-1] > DIVERGED * min(smoothed):
            control.should_training_stop = True


def find_rate(
    recipe: Recipe, console: Console, steps: int = 60, lowest: float = 1e-6, highest: float = 1.0
) -> RangeTest:
    """Trains a fresh adapter for a few steps at growing rates, and leaves nothing behind.

    Args:
        recipe: the run that the rate is for; its length, rate and schedule do not count.
        console: where the user is told about the run.
        steps: how many.
        lowest, highest: the first and the last rate.

    Raises:
        LorakinError: the recipe, the model or the data cannot be used.
    """
    require(steps >= FEWEST_STEPS, f"--steps must be at least {FEWEST_STEPS}, not {steps}")
    require(
        0 < lowest < highest < math.inf,
        f"expected 0 < --from < --to, not --from {lowest:g} and --to {highest:g}",
    )
    with tempfile.TemporaryDirectory(prefix="lorakin-lr-") as folder:
        short = dataclasses.replace(
            recipe,
            out=str(Path(folder) / "run"),
            lr=lowest,
            steps=steps,
            epochs=None,
            schedule="constant",
            schedule_args={},
            warmup=0.0,
            save_every=0,
            eval_every=None,
            keep="last",
            early_stopping=None,
            report_to=[],
        )
        run = training.prepare(short, console)
        recording = Recording()
        try:
            # The highest rates are there to diverge.
            with contextlib.suppress(DivergedError):
                trainer = trainer_of(
                    run, lambda step: {}, [recording], RangeTraining, highest=highest
                )
                trainer.train()
        finally:
            run.directory_lock.release()
    return RangeTest(recording.rates, recording.losses)
