"""The conditions of a planned run: everything but its method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from lorakin.inject.heads import head_of
from lorakin.inject.targets import ALL_LINEAR, Targets
from lorakin.plan.meta_model import meta_model
from lorakin.training.tasks import Task, planned_task


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Everything but the method that decides a planned run.

    Attributes:
        config: the model's transformers config.
        dtype: the dtype of the base model.
        device: "cpu" or "cuda". Both are rehearsed with the CPU's operations, which torch has
            everywhere.
        labels: the number of a classifier's classes, 1 for regression; None for a language model.
        task: the word of the task; None is what `labels` tells.
        batch_size: the number of rows in a batch.
        max_length: the number of tokens in every row.
        accumulate: the number of batches in an optimizer step.
        padded: whether rows differ in length, so that attention gets a mask.
        packing: whether several rows share a sequence, so that attention gets a mask of them.
        gradient_checkpointing, fuse, targets, exclude, layers, modules_to_save, rank_above: as for
            `lorakin train`.
        steps: the number of optimizer steps of the run.
    """

    config: Any
    dtype: torch.dtype
    device: str = "cpu"
    labels: int | None = None
    task: str | None = None
    batch_size: int = 8
    max_length: int = 1024
    accumulate: int = 1
    padded: bool = True
    packing: bool = False
    gradient_checkpointing: bool = False
    fuse: bool = False
    targets: Targets = ALL_LINEAR
    exclude: Sequence[str] = ()
    layers: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()
    rank_above: str = "refuse"
    steps: int = 1000

    @property
    def learned(self) -> Task:
        """The task.

        Raises:
            SettingError: `labels` does not suit it.
        """
        return planned_task(self.task, self.labels, self.config)

    def model(self) -> Any:
        """Returns the model on the meta device.

        Raises:
            ModelError: the config belongs to another kind of model.
        """
        model = meta_model(self.config, self.dtype, auto=self.learned.auto)
        if self.learned.labels is not None and model.config.pad_token_id is None:
            model.config.pad_token_id = 0  # as training takes the tokenizer's
        return model

    def adapt_arguments(self, model: Any) -> dict[str, Any]:
        """Returns the arguments of `lorakin.adapt` that choose modules; a new head trains whole."""
        whole = self.modules_to_save or (head_of(model) if self.learned.labels is not None else [])
        return {
            "targets": self.targets,
            "exclude": self.exclude,
            "layers": self.layers,
            "modules_to_save": list(whole),
            "rank_above": self.rank_above,
        }
