"""What a member may look at before it starts: base weights, and what is measured on data.

A member declares it in `needs`. One piece of code measures inputs and gradients for all members and
modules (`inject/measuring.py`). It feeds the member's `Collector`, whose result for a module comes
back in its `UnadaptedModule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lorakin.family.pair import Shape
from lorakin.family.precision import wide_dtype
from lorakin.family.weight import FrozenWeight

WEIGHT = "weight"
"""The member looks at the base weights of its modules."""
INPUTS = "inputs"
"""It looks at its modules' inputs on batches of data, in eval mode."""
GRADIENTS = "gradients"
"""It looks at the gradients of the loss by its modules' weights, in eval mode."""
NEEDS = frozenset({WEIGHT, INPUTS, GRADIENTS})


class UnadaptedModule(NamedTuple):
    """A module that is about to be adapted.

    `weight` is its base weight as a matrix (outputs, inputs), on the meta device if it is unknown.
    `measured` is the collector's result for it. It is None where nothing is measured: when a file
    is loaded, and in plans.
    """

    shape: Shape
    weight: Tensor | FrozenWeight
    measured: Any = None

    def wide_weight(self) -> Tensor:
        """Returns the base weight, (outputs, inputs), in float32 at least."""
        matrix = self.weight.matrix if isinstance(self.weight, FrozenWeight) else self.weight
        return matrix.detach().to(wide_dtype(matrix.dtype))


class Collector(Protocol):
    """Takes in measurements, batch by batch."""

    def wants(self, path: str) -> bool:
        """Returns whether it still needs measurements of the module at `path`."""

    def add(self, path: str, measured: Tensor) -> None:
        """Takes in one call of a module, in float32 at least.

        `measured` holds the inputs (tokens, inputs) without padding, or a gradient (outputs,
        inputs). Modules that get the same input give the same object.
        """

    def end_batch(self) -> bool:
        """Ends a batch, and returns whether it has enough."""

    def results(self) -> Mapping[str, Any]:
        """Returns path → its result there, for `UnadaptedModule.measured`."""
