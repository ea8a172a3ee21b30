"""Everything that `import lorakin as lk` offers; `lorakin/__init__.py` loads it on first use."""

from __future__ import annotations

from lorakin.adapter import Adapter, activate, adapt, adapters, importance, load, merge, mixed_batch
from lorakin.conversion import as_lora, combine, convert
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
    VerificationError,
)
from lorakin.family import AdaLoRA, DeltaLoRA, DoRA, LoRA, LoRADrop, LoRAFA, LoRAPlus, VeRA
from lorakin.inject.llama_fusions import fuse, unfuse
from lorakin.inject.reference import reference
from lorakin.inject.status import Status, status

__all__ = [
    "AdaLoRA",
    "Adapter",
    "AdapterError",
    "DataError",
    "DeltaLoRA",
    "DivergedError",
    "DoRA",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "LoRAPlus",
    "LorakinError",
    "LorakinWarning",
    "ModelError",
    "OutputError",
    "SettingError",
    "StateError",
    "Status",
    "TargetError",
    "VeRA",
    "VerificationError",
    "activate",
    "adapt",
    "adapters",
    "as_lora",
    "combine",
    "convert",
    "fuse",
    "importance",
    "load",
    "merge",
    "mixed_batch",
    "reference",
    "status",
    "unfuse",
]
