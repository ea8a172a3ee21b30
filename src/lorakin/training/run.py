"""A training run: what is ready to train, and what came out of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakin.adapter import Adapter
from lorakin.training import processes
from lorakin.training.batches import digest
from lorakin.training.encoding import Encoded
from lorakin.training.epoch import Epoch
from lorakin.training.models import Loaded
from lorakin.training.recipe import Recipe
from lorakin.training.run_directory import RunDirectoryLock
from lorakin.training.stream import TrainingStream
from lorakin.training.tasks import Evaluation, Task

LOSS = "loss"
"""The figure that every run has."""


@dataclasses.dataclass
class PreparedRun:
    """A run that is ready to train: data read, model loaded, adapter placed, nothing trained yet.

    Attributes:
        recipe: the effective recipe: dtype, learning rate, labels and row length are decided.
        out: the run's directory.
        loaded: the model and its tokenizer.
        train: the rows to train on, tokenised.
        held_out: the rows to evaluate on, tokenised.
        task: what is learned.
        directory_lock: the lock of the directory, with the checkpoint to resume from.
        console: where the user is told about the run.
        stream: the rows to train on, if they are read while training; `train` is then a sample.
        adapter: the adapter, once it is placed.
    """

    recipe: Recipe
    out: Path
    loaded: Loaded
    train: Encoded
    held_out: Encoded
    task: Task
    directory_lock: RunDirectoryLock
    console: Console
    stream: TrainingStream | None = None
    adapter: Adapter = dataclasses.field(init=False)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that the run resumes from, None for a new run."""
        return self.directory_lock.checkpoint

    @property
    def rows_per_step(self) -> int:
        """How many rows one optimizer step sees, over all processes."""
        return self.recipe.batch_size * self.recipe.accumulate * processes.count()

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the whole run."""
        per_epoch = math.ceil(len(self.epoch) / self.rows_per_step)
        return self.recipe.steps or max(1, math.ceil(per_epoch * (self.recipe.epochs or 1)))

    @functools.cached_property
    def epoch(self) -> Epoch:
        """What one pass over the data trains on."""
        return Epoch.of(self.train, self.recipe)

    @functools.cached_property
    def rows_digest(self) -> int:
        """A digest of the tokenised rows: other rows have another one."""
        return digest(self.train.examples, self.held_out.examples)

    @property
    def checkpoint_interval(self) -> int:
        """The number of steps between two checkpoints: `save_every`, or a fifth of the run.

        A run that keeps the best step has one at each evaluation.
        """
        if self.recipe.keep == "best" and self.recipe.eval_every is not None:
            return self.recipe.eval_every
        return self.recipe.save_every or max(1, self.total_steps // 5)

    def collator(self) -> Any:
        """Returns the collator that makes batches of this run's rows."""
        return self.task.collator(self.loaded.model, self.loaded.tokenizer)

    def evaluate(self, intervals: bool = False) -> Evaluation:
        """Evaluates the model as it is now on the held-out rows.

        What training draws at random next is as if it had not been asked.
        """
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for its workers
            return self.task.evaluate(
                self.loaded.model,
                self.collator(),
                self.held_out.examples,
                self.recipe.batch_size,
                intervals,
            )


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run's training ended.

    Attributes:
        steps: the optimizer steps that were taken.
        total_steps: those that were planned.
        best_step: the step whose adapter was kept; None for the last one.
        metric: the figure that decided.
    """

    steps: int
    total_steps: int
    best_step: int | None = None
    metric: str = LOSS

    @property
    def words(self) -> str:
        """The ending in words, empty for a run that took all steps and kept the last.

        >>> Ending(30, 60, best_step=20, metric="accuracy").words
        'stopped after step 30 of 60; kept step 20, the best by accuracy'
        """
        early = self.steps < self.total_steps
        best = self.best_step is not None
        parts = [
            f"stopped after step {self.steps} of {self.total_steps}" if early else "",
            f"kept step {self.best_step}, the best by {self.metric}" if best else "",
        ]
        return "; ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run: where it lies, and its figures before and after."""

    out: Path
    ending: Ending
    before: Evaluation
    after: Evaluation
    trainable_parameters: int
    adapter_bytes: int
    seconds: float

    @property
    def steps(self) -> int:
        """The optimizer steps that were taken."""
        return self.ending.steps

    def as_dict(self) -> dict[str, Any]:
        """Returns the result for `--json`."""
        return {
            "out": str(self.out),
            "steps": self.steps,
            **({} if self.ending.best_step is None else {"best_step": self.ending.best_step}),
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "trainable_parameters": self.trainable_parameters,
            "adapter_bytes": self.adapter_bytes,
            "seconds": round(self.seconds, 1),
        }
