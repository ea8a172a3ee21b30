"""The probe of LoRA-drop: a short training run before the real one."""

from __future__ import annotations

from typing import NamedTuple


class Probe(NamedTuple):
    """A short training run before the real one, which shows how important each module is."""

    sample: float
    """The share of the data to train on."""
    epochs: int
    """How often to see it."""
    normalised: bool
    """Whether a module's importance is relative to the size of its own output."""
