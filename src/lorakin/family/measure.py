"""What a member may look at before it starts: base weights, and what is measured on data.

A member declares it in `needs`. One piece of code measures inputs and gradients for all members and
modules (`inject/measuring.py`). It feeds the member's `Collector`, and what that found for a module
comes back in the module's `UnadaptedModule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorakin.family.pair import Shape
from lorakin.family.weight import FrozenWeight

WEIGHT = "weight"
"""The member looks at the base weights of its modules."""
INPUTS = "inputs"
"""It looks at its modules' inputs on batches of data, in eval mode."""
GRADIENTS = "gradients"
"""It looks at the gradients of the loss by its modules' weights, in eval mode."""


class UnadaptedModule(NamedTuple):
    """A module that is about to be adapted.

    `weight` is its base weight as a matrix (outputs, inputs), on the meta device if it is unknown.
    `measured` is what the member's collector found for it. It is None where nothing is measured:
    when a file is loaded, and in plans.
    """

    shape: Shape
    weight: Tensor | FrozenWeight
    measured: Any = None


class Collector(Protocol):
    """Takes in measurements, batch by batch."""

    def wants(self, path: str) -> bool:
        """Whether it still needs what the module at `path` shows."""

    def add(self, path: str, seen: Tensor) -> None:
        """Take in one call of a module, in float32 at least.

        `seen` holds the inputs (tokens, inputs) without padding, or a gradient (outputs, inputs).
        Modules that get the same tensor show the same object.
        """

    def end_batch(self) -> bool:
        """Called after each batch: whether it has seen enough."""

    def results(self) -> Mapping[str, Any]:
        """Path → what it found there, for `UnadaptedModule.measured`."""


class Probe(NamedTuple):
    """A short training run before the real one, which shows how important each module is."""

    sample: float
    """The share of the data to train on."""
    epochs: int
    """How often to see it."""
    normalised: bool
    """Whether a module's importance is relative to the size of its own output."""
