"""A training run: what is ready to train, and what came out of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakin.adapter import Adapter
from lorakin.training import processes
from lorakin.training.batches import digest
from lorakin.training.encoding import Encoded
from lorakin.training.models import Loaded
from lorakin.training.recipe import Recipe
from lorakin.training.run_directory import RunDirectoryLock
from lorakin.training.tasks import Evaluation, Task


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
        per_epoch = math.ceil(len(self.train.examples) / self.rows_per_step)
        return self.recipe.steps or max(1, math.ceil(per_epoch * (self.recipe.epochs or 1)))

    @functools.cached_property
    def rows_digest(self) -> int:
        """A digest of the tokenised rows: other rows have another one."""
        return digest(self.train.examples, self.held_out.examples)

    @property
    def checkpoint_interval(self) -> int:
        """The number of steps between two checkpoints: `save_every`, or a fifth of the run."""
        return self.recipe.save_every or max(1, self.total_steps // 5)

    def collator(self) -> Any:
        """Returns the collator that makes batches of this run's rows."""
        return self.task.collator(self.loaded.model, self.loaded.tokenizer)

    def evaluate(self, intervals: bool = False) -> Evaluation:
        """Evaluates the model as it is now on the held-out rows."""
        return self.task.evaluate(
            self.loaded.model,
            self.collator(),
            self.held_out.examples,
            self.recipe.batch_size,
            intervals,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of a run: where it lies, and its figures before and after."""

    out: Path
    steps: int
    before: Evaluation
    after: Evaluation
    trainable_parameters: int
    adapter_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the result for `--json`."""
        return {
            "out": str(self.out),
            "steps": self.steps,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "trainable_parameters": self.trainable_parameters,
            "adapter_bytes": self.adapter_bytes,
            "seconds": round(self.seconds, 1),
        }
