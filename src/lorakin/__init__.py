"""lorakin: the LoRA family of fine-tuning methods, on your model, in place."""

from lorakin.adapter import Adapter, activate, adapt, adapters, load
from lorakin.errors import (
    AdapterError,
    DataError,
    DivergedError,
    LorakinError,
    LorakinWarning,
    ModelError,
    OutputError,
    SettingError,
    StateError,
    TargetError,
)
from lorakin.family import LoRA

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "DataError",
    "DivergedError",
    "LoRA",
    "LorakinError",
    "LorakinWarning",
    "ModelError",
    "OutputError",
    "SettingError",
    "StateError",
    "TargetError",
    "activate",
    "adapt",
    "adapters",
    "load",
]
