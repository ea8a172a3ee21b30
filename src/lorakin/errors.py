"""Every error that lorakin raises on purpose.

A message says what was wrong, what was expected and what to do, and repeats what the user wrote.
The command line prints it without a traceback and ends with the class's `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class LorakinError(Exception):
    """Base of all errors below; catch this one to catch them all."""

    exit_code = 2


class SettingError(LorakinError, ValueError):
    """A setting outside its range, unknown, or at odds with another."""


class TargetError(LorakinError, ValueError):
    """A target selects nothing, or something that cannot be adapted."""


class AdapterError(LorakinError, ValueError):
    """An adapter directory that is broken, incomplete, unsupported, or made for another base model."""


class StateError(LorakinError, RuntimeError):
    """A call that the adapter's present state does not allow, such as switching while merged."""


class ModelError(LorakinError, ValueError):
    """A base model that cannot be found or loaded."""


class DataError(LorakinError, ValueError):
    """Data that cannot be read, has no known format, or leaves nothing to learn from."""


class OutputError(LorakinError, OSError):
    """A result that cannot be written where the user asked."""


class VerificationError(LorakinError, RuntimeError):
    """What was written is not the model that was trained, within the tolerance. It was not kept; `report` has the figures."""

    exit_code = 4

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class DivergedError(LorakinError, RuntimeError):
    """The loss became NaN or infinite. `step` is the optimizer step (counted from 1) at which it was seen."""

    exit_code = 3

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class LorakinWarning(UserWarning):
    """Something that would otherwise make an adapter pretend to work."""


def some(names: Iterable[str]) -> str:
    """The first of many names, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
