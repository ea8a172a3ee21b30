"""What the parts of an adapter share: the adapter itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lorakin.errors import StateError
from lorakin.inject.adapted import is_adapted, module_at
from lorakin.inject.attachments import Attachments, attachments_of
from lorakin.inject.model_hooks import exchanged_message

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter
    from lorakin.inject.placement import Placement


class Part:
    """One of the things that an adapter is made of: its tensors, its merging, its run."""

    def __init__(self, adapter: InsertedAdapter) -> None:
        self.adapter = adapter

    @property
    def model(self) -> nn.Module:
        """The model that the adapter is in."""
        return self.adapter.model

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.adapter.name

    @property
    def placement(self) -> Placement:
        """Which modules it adapts, and with what."""
        return self.adapter.placement


def attachments_at(model: nn.Module, path: str) -> Attachments:
    """What is attached to the module at `path`; raises `StateError` if the module was exchanged."""
    module = module_at(model, path)
    if not is_adapted(module):
        raise StateError(exchanged_message(path))
    return attachments_of(module)
