"""Everything that `import lorakin as lk` offers; `lorakin/__init__.py` loads it on first use."""

from __future__ import annotations

from lorakin.adapter import Adapter
from lorakin.adapting import adapt, importance
from lorakin.combined import combine
from lorakin.conversion import as_lora, convert
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
from lorakin.family import register
from lorakin.family.members import *  # noqa: F403 - the list of names is there alone
from lorakin.family.members import __all__ as _members
from lorakin.inject.llama_fusions import fuse, unfuse
from lorakin.inject.reference import reference
from lorakin.inject.status import Status, status
from lorakin.loading import load
from lorakin.switching import activate, adapters, merge, mixed_batch

__all__ = [
    "Adapter",
    "AdapterError",
    "DataError",
    "DivergedError",
    "LorakinError",
    "LorakinWarning",
    "ModelError",
    "OutputError",
    "SettingError",
    "StateError",
    "Status",
    "TargetError",
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
    "register",
    "status",
    "unfuse",
]
__all__ += _members
