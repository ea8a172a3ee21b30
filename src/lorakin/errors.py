"""Every error that lorakin raises on purpose.

A message says what was wrong, what was expected and what to do, and repeats what the user wrote.
The command line prints it without a traceback and ends with the class's `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class LorakinError(Exception):
    """Base of all errors below; catch it to catch them all.

    >>> import lorakin as lk
    >>> try:
    ...     lk.LoRA(rank=0)
    ... except lk.LorakinError as error:
    ...     print(error)
    rank must be a whole number ≥ 1, not 0
    """

    exit_code = 2


class SettingError(LorakinError, ValueError):
    """A setting is outside its range, unknown, or contradicts another."""


class TargetError(LorakinError, ValueError):
    """A target selects nothing, or something that cannot be adapted."""


class AdapterError(LorakinError, ValueError):
    """An adapter directory is broken, incomplete, unsupported, or made for another base model."""


class StateError(LorakinError, RuntimeError):
    """The adapter's present state does not allow the call, such as switching while merged."""


class ModelError(LorakinError, ValueError):
    """A base model cannot be found or loaded."""


class DataError(LorakinError, ValueError):
    """Data cannot be read, has no known format, or leaves nothing to learn from."""


class OutputError(LorakinError, OSError):
    """A result cannot be written where the user asked."""


class VerificationError(LorakinError, RuntimeError):
    """What was written is not the model that was trained, within the tolerance, and was not kept.

    `report` holds the figures.
    """

    exit_code = 4

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class DivergedError(LorakinError, RuntimeError):
    """The loss became NaN or infinite, at optimizer step `step` (counted from 1)."""

    exit_code = 3

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class LorakinWarning(UserWarning):
    """Without this warning an adapter would only seem to work."""


def some(names: Iterable[str]) -> str:
    """Returns the first of many names, for a message.

    >>> some("abcde")
    'a, b, c and 2 more'
    """
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
