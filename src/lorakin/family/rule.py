"""What a member does at optimizer steps: its rule, and how a rule sees an adapted module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lorakin.family.pair import Shape, Tensors, Weight

if TYPE_CHECKING:
    from lorakin.family.method import Method


class AdaptedModule(Protocol):
    """An adapted module as a rule sees it."""

    @property
    def path(self) -> str:
        """Where the module is in the model."""

    @property
    def shape(self) -> Shape:
        """The shape of its weight."""

    @property
    def method(self) -> Method:
        """The method, with this module's own rank and alpha."""

    @property
    def weight(self) -> Tensor | Weight:
        """Its base weight as a matrix (outputs, inputs)."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its tensors by slot."""

    def trains(self, slot: str) -> bool:
        """Whether the method trains this tensor."""

    def put(self, slot: str, tensor: Tensor) -> None:
        """Give it one more tensor, which does not train."""

    def take(self, slot: str) -> Tensor:
        """Take such a tensor away from it."""

    def move_base(self, change: Tensor) -> None:
        """Add `change` (outputs, inputs) to a copy of the base weight, which takes its module."""

    def restore_base(self) -> None:
        """Put the base's own weight back, if it was moved."""


class Rule:
    """What a member does at the optimizer steps of one adapter, and what it remembers between them.

    n counts real optimizer steps from 1: accumulated batches are one step, a skipped step is none.
    """

    turns: tuple[int, ...] = ()
    """The steps after which the adapter holds more tensors; memory is planned for what follows."""

    def before(self, n: int) -> None:
        """Gradients are complete, unscaled and not yet used: read them or change them."""

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        """The step has been taken: change tensors."""

    def end(self) -> None:
        """The run is over, or goes on elsewhere: leave nothing outside the adapter's tensors."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, tensors, and dicts of them."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state()` gave; the adapter's tensors are restored already."""

    def beside(self, path: str) -> Tensors:
        """Tensors that the adapter's files must hold beside those of the module at `path`."""
        return {}

    def gave_up(self, module: AdaptedModule) -> bool:
        """Whether the member took all ranks from this module, so that it rightly changes nothing."""
        return False

    def check(self, n: int) -> str | None:
        """What the member was to do and did not do in n steps; asked when the adapter is saved."""
        return None
