"""What a member may look at before it starts: the base weights, and what is measured on data.

A member says in `needs` what it looks at. Inputs and gradients are measured by one piece of code for all
members and modules (`inject/measuring.py`); the member gives an `Collector` that takes them in, and gets
what that has found for a module in the module's `Target`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorakin.family.pair import Shape, Weight

WEIGHT = "weight"
"""The member looks at the base weights of its modules."""
INPUTS = "inputs"
"""It looks at what its modules are given on batches of data, in eval mode."""
GRADIENTS = "gradients"
"""It looks at the gradients of the loss by its modules' weights, in eval mode."""


class Target(NamedTuple):
    """A module that is about to be adapted.

    `weight` is its base weight as a matrix (outputs, inputs), on the meta device where it is not known.
    `measured` is what the member's collector found there.
    """

    shape: Shape
    weight: Tensor | Weight
    measured: Any = None


class Collector(Protocol):
    """Takes in what is measured, batch by batch."""

    def wants(self, path: str) -> bool:
        """Whether it still takes in what the module at `path` shows."""

    def see(self, path: str, seen: Tensor) -> None:
        """Take in one call of a module, in float32 at least.

        `seen` holds its inputs (tokens, inputs) without padding, or a gradient (outputs, inputs).
        Modules that are given one tensor show one object.
        """

    def settled(self) -> bool:
        """Say after each batch whether it has seen enough."""

    def found(self) -> Mapping[str, Any]:
        """Path → what it found there, for `Target.measured`."""


class Probe(NamedTuple):
    """A short training run before the real one; a member then chooses its modules by importance."""

    sample: float
    """The share of the data to train on."""
    epochs: int
    """How often to see it."""
    normalised: bool
    """Whether importance is relative to the size of each module's own output."""
