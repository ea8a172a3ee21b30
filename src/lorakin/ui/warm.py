"""Imports what is slow to import while the user reads the page."""

from __future__ import annotations

import functools
import threading


def _import() -> None:
    import lorakin.plan.advice
    import lorakin.training.preview
    import lorakin.training.speakers  # noqa: F401


@functools.cache
def _importing() -> threading.Thread:
    thread = threading.Thread(target=_import, name="imports", daemon=True)
    thread.start()
    return thread


def begin() -> None:
    """Begins to import torch, transformers and what lorakin builds on them."""
    _importing()


def is_done() -> bool:
    """Returns whether they are imported: what a timer asks for can come later."""
    return not _importing().is_alive()


def wait() -> None:
    """Waits until they are imported: two threads must not import them at once."""
    _importing().join()
