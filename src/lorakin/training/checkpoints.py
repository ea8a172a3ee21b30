"""Checkpoints of transformers' Trainer, and of TRL's, that hold the adapters instead of the whole base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorakin.adapter import Adapter, adapters
from lorakin.errors import StateError
from lorakin.storage import directory

DEFAULT = "default"


class AdapterCheckpoints:
    """Mixed in before a Trainer class: saves and loads adapters where the Trainer would the model.

    The adapter "default" lies in the checkpoint itself, any other in a directory of its name, as PEFT lays them out.
    """

    model: Any
    args: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            for name, adapter in self._adapters().items():
                directory.save(adapter, _place(output_dir or self.args.output_dir, name))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for name, adapter in self._adapters().items():
            adapter.restore(_place(resume_from_checkpoint, name))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _adapters(self) -> dict[str, Adapter]:
        found = adapters(self.model)
        if not found:
            raise StateError("the trainer's model has no adapters to save; call lorakin.adapt(model, …) first")
        return found


def adapter_checkpoints(trainer: Any) -> Any:
    """Make `trainer` (any subclass of transformers' Trainer, TRL's included) checkpoint adapters only; returns it.

    Without this, a Trainer's checkpoint holds the base model alone, and resuming from it warns that the adapters keep
    their present values.
    """
    cls = type(trainer)
    if not isinstance(trainer, AdapterCheckpoints):
        trainer.__class__ = type(cls.__name__, (AdapterCheckpoints, cls), {"__module__": cls.__module__})
    return trainer


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. The Trainer's state is written last, so it marks one."""
    numbered = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / "trainer_state.json").is_file():
            numbered.append((int(number), path))
    return max(numbered)[1] if numbered else None


def _place(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) if name == DEFAULT else Path(folder) / name
