"""TRL's trainers on rows that lorakin tokenised."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from torch import nn

from lorakin.family.settings import require
from lorakin.training import processes
from lorakin.training.reference_adapter import reference_view

QUIET: Mapping[str, Any] = {
    # TRL's defaults are others than transformers'. lorakin casts and checkpoints by itself.
    "bf16": False,
    "gradient_checkpointing": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


class Ready(datasets.Dataset):
    """Tokenised rows, on which a trainer has nothing to do."""

    def map(self, *args: Any, **kwargs: Any) -> Ready:
        """Returns the rows as they are."""
        return self

    @classmethod
    def of(cls, rows: Any) -> Ready:
        """Returns rows that stay as they are."""
        ready: Any = copy.copy(rows if isinstance(rows, datasets.Dataset) else cls.from_list(rows))
        ready.__class__ = cls
        found: Ready = ready
        return found


class OwnRows:
    """Mixed in before a trainer of TRL: takes tokenised rows as they are.

    Nothing is sent to the hub, and no card is written into checkpoints.
    """

    def __init__(self, train_dataset: Any, eval_dataset: Any, **kwargs: Any) -> None:
        is_stream = not isinstance(train_dataset, datasets.Dataset)
        rows = Ready.of([next(iter(train_dataset))] if is_stream else train_dataset)
        given = {"train_dataset": rows, "eval_dataset": Ready.of(eval_dataset)}
        super().__init__(**given, **kwargs)
        if is_stream:  # which TRL would not take
            self.train_dataset = train_dataset

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """Returns nothing to add to a row."""
        return {}

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a checkpoint is no adapter to publish."""


def alone(model: nn.Module) -> dict[str, Any]:
    """Returns no arguments, for a trainer that compares with nothing."""
    return {}


def reference_of(model: nn.Module) -> dict[str, Any]:
    """Returns the argument of a trainer that compares with a reference: the model itself."""
    return {"ref_model": reference_view(model)}


def check_unsharded(task: str) -> None:
    """Checks that each process holds the whole model, since the reference is a view of it.

    Raises:
        SettingError: it is sharded.
    """
    require(
        not processes.shard(),
        f"--task {task} compares with the same model without its adapter, which is not done under "
        "FSDP or DeepSpeed: leave --fsdp and --zero out, or take --task orpo",
    )


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Gives a model its forward and its dropout back, which TRL's trainers change for good."""
    forward = vars(model).get("forward")
    dropout = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if forward is not None:
            vars(model)["forward"] = forward
        for module, p in dropout.items():
            module.p = p
