"""What another process asks of a run: to pause, or to stop and keep what it has learned.

The request is a file in the run's directory, so it reaches a run on another machine, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from lorakin.errors import OutputError, StateError
from lorakin.storage import locks
from lorakin.training.run_files import LOCK, REQUEST

Request = Literal["pause", "stop"]
PAUSE: Final = "pause"
"""Write a checkpoint after the current step, and end; `--resume` continues there."""
STOP: Final = "stop"
"""End after the current step as if it were the last: figures, and the adapter."""


def ask(out: Path, request: Request) -> None:
    """Asks the run that is at work in a directory to pause or to stop.

    Raises:
        StateError: no run is at work there.
        OutputError: the directory cannot be written.
    """
    if locks.holder(out / LOCK) is None:
        raise StateError(f"no run is at work in {out}, so there is none to {request}")
    try:
        # What is read while it is half written is no request yet.
        (out / REQUEST).write_text(request, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {out / REQUEST}: {error.strerror or error}") from error


def asked(out: Path) -> Request | None:
    """Returns what is asked of the run in a directory."""
    try:
        text = (out / REQUEST).read_text(encoding="utf-8")
    except OSError:
        return None
    return PAUSE if text == PAUSE else STOP if text == STOP else None
