"""Base class of an adapter's parts: its tensors, its effect and its run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter
    from lorakin.inject.placement import Placement


class Part:
    """One of the objects that an adapter consists of; it knows the adapter."""

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
        """Which modules the adapter is on, and with what settings."""
        return self.adapter.placement
