"""What a member does at optimizer steps: its rule, and how a rule sees an adapted module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lorakin.family.pair import Shape, Tensors
from lorakin.family.weight import FrozenWeight

if TYPE_CHECKING:
    from lorakin.family.method import Method


class AdaptedModule(Protocol):
    """An adapted module as a rule sees it."""

    @property
    def path(self) -> str:
        """The module's path in the model."""

    @property
    def shape(self) -> Shape:
        """The shape of its weight as a matrix."""

    @property
    def method(self) -> Method:
        """The method, with this module's own rank and alpha."""

    @property
    def weight(self) -> Tensor | FrozenWeight:
        """Its base weight as a matrix (outputs, inputs)."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its tensors by slot."""

    def trains(self, slot: str) -> bool:
        """Whether the method trains the tensor of this slot."""

    def put(self, slot: str, tensor: Tensor) -> None:
        """Add a tensor to the module, which does not train."""

    def take(self, slot: str) -> Tensor:
        """Remove such a tensor from the module, and return it."""

    def move_base(self, change: Tensor) -> None:
        """Add `change` (outputs, inputs) to a copy of the base weight, and use the copy."""

    def restore_base(self) -> None:
        """Put the base's own weight back, if it was moved."""


class Rule:
    """What a member does at the optimizer steps of one adapter, and what it remembers between them.

    n counts real optimizer steps from 1: accumulated batches are one step, a skipped step is none.
    """

    grows_after: tuple[int, ...] = ()
    """The steps after which the adapter holds more tensors, which memory must be planned for."""

    def before(self, n: int) -> None:
        """Read or change the gradients, which are complete, unscaled and not yet used."""

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        """Change tensors, now that the step has been taken."""

    def end(self) -> None:
        """The run ends or continues elsewhere: leave nothing outside the adapter's tensors."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, tensors, and dicts of them by text."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state()` returned; the adapter's tensors are restored already."""

    def extra_tensors(self, path: str) -> Tensors:
        """More tensors that the adapter's files must hold for the module at `path`."""
        return {}

    def took_all_ranks(self, module: AdaptedModule) -> bool:
        """Whether the member took all ranks from this module, which then rightly is unchanged."""
        return False

    def unfinished(self, n: int) -> str | None:
        """What the member has not done by step n although it should have; asked at saving."""
        return None
