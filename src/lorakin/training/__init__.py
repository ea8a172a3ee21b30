"""Training on transformers' Trainer. Needs the `train` extra.

`AdapterTraining` and `prepare_trainer` work with any Trainer. They are loaded on first use, so that
the command line's help does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakin.training.trainers import AdapterTraining, prepare_trainer

__all__ = ["AdapterTraining", "prepare_trainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("lorakin.training.trainers"), name)
