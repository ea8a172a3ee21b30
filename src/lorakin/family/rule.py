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
        """The method, with this module's rank and alpha."""

    @property
    def weight(self) -> Tensor | FrozenWeight:
        """Its base weight as a matrix (outputs, inputs)."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Returns its tensors by slot."""

    def trains(self, slot: str) -> bool:
        """Returns whether the method trains the tensor of this slot."""

    def put(self, slot: str, tensor: Tensor) -> None:
        """Adds a tensor to the module, which does not train."""

    def take(self, slot: str) -> Tensor:
        """Removes such a tensor from the module, and returns it."""

    def move_base(self, change: Tensor) -> None:
        """Adds `change` (outputs, inputs) to a copy of the base weight, and uses the copy."""

    def restore_base(self) -> None:
        """Puts the base weight back, if it was moved."""


class Rule:
    """What a member does at the optimizer steps of one adapter, and what it remembers between them.

    n counts real optimizer steps from 1: accumulated batches are one step, a skipped step is none.
    """

    grows_after: tuple[int, ...] = ()
    """The steps after which the adapter holds more tensors, which memory must be planned for."""
    is_same_at_each_step: bool = False
    """Whether it computes the same at every step, so that a CUDA graph can capture it."""

    def before(self, n: int) -> None:
        """Reads or changes the gradients, which are complete, unscaled and not yet used."""

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        """Changes tensors, now that the step has been taken."""

    def end(self) -> None:
        """Ends the run here, and leaves nothing outside the adapter's tensors."""

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs: numbers, strings, tensors, dicts and lists of these.

        It is saved as JSON and tensors, so in what `restore` takes after loading, keys are strings
        and tuples are lists.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state()` returned; the adapter's tensors are restored already."""

    def extra_tensors(self, path: str) -> Tensors:
        """Returns more tensors that the adapter's files must hold for the module at `path`."""
        return {}

    def took_all_ranks(self, module: AdaptedModule) -> bool:
        """Returns whether the member took all ranks from this module, so that it is unchanged."""
        return False

    def unfinished(self, n: int) -> str | None:
        """Returns what the member should have done by step n and has not; called at saving."""
        return None
