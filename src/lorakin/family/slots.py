"""Slots: the tensors that a member hangs on each module, declared as data.

    slots = {
        "A": Slot(("rank", "inputs")),
        "B": Slot(("outputs", "rank"), starts_at_zero=True),
    }

Everything else that must know a member's tensors reads it from here: which of them train and decay,
which one LoRA+ speeds up, which ranks can be freed, how many numbers there are, and how PEFT's files
name them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lorakin.family.pair import Shape


@dataclass(frozen=True)
class Slot:
    """One tensor of a member on one module."""

    shape: tuple[str | int, ...]
    """Its dimensions: `rank`, `inputs`, `outputs`, or a number."""
    trained: bool = True
    """Whether an optimizer trains it."""
    starts_at_zero: bool = False
    """Whether it is what makes the change zero at the start."""
    decays: bool = True
    """Whether weight decay may act on it."""
    shared: bool = False
    """Whether all modules use one tensor, which is as large as the largest of them needs."""
    of_pair: bool = True
    """Whether modules that share a pair share it too."""
    drawn: bool = False
    """Whether it is the random factor that LoRA-FA keeps as it was drawn."""
    peft: str = ""
    """Its name in PEFT's files: behind the module's path or, if shared, the whole key."""
    rate: float = 1.0
    """How many times faster than the rest of the adapter it learns."""
    lr: float | None = None
    """A learning rate of its own, whatever the rest has."""

    def sizes(self, rank: int, shape: Shape) -> tuple[int, ...]:
        """Its shape on a weight of this shape, at this rank.

        >>> Slot(("outputs", "rank")).sizes(4, Shape(outputs=10, inputs=20))
        (10, 4)
        """
        named = {"rank": rank, "inputs": shape.inputs, "outputs": shape.outputs}
        return tuple(size if isinstance(size, int) else named[size] for size in self.shape)

    @property
    def rank_axis(self) -> int | None:
        """The one dimension along which it has an entry for each rank; None if there is no such one."""
        axes = [axis for axis, size in enumerate(self.shape) if size == "rank"]
        return axes[0] if len(axes) == 1 else None

    @property
    def is_scale_of_ranks(self) -> bool:
        """Whether it holds one number for each rank and nothing else."""
        return self.rank_axis is not None and all(size in ("rank", 1) for size in self.shape)


Slots = Mapping[str, Slot]
"""A member's slots by their names."""


def frozen(slots: Slots) -> dict[str, Slot]:
    """The same slots, none of them trained."""
    return {name: dataclasses.replace(slot, trained=False) for name, slot in slots.items()}


def scale_of_ranks(slots: Slots) -> str | None:
    """The trained slot by which a single rank can be switched off: E of P·E·Q, VeRA's d."""
    return next((n for n, slot in slots.items() if slot.is_scale_of_ranks and slot.trained), None)


def sides_of_ranks(slots: Slots) -> dict[str, int]:
    """The slots beside that scale, and the axis along which each has its ranks.

    Empty if ranks cannot be freed: where modules share a tensor, the others still need them.
    """
    of_ranks = {n: s for n, s in slots.items() if s.of_pair and not s.is_scale_of_ranks}
    sides = {name: slot.rank_axis for name, slot in of_ranks.items() if slot.rank_axis is not None}
    return {} if any(slots[name].shared for name in sides) else sides


def factors_of(slots: Slots) -> tuple[str, str] | None:
    """The slots of a plain product up·down, (up, down); None if the change is made of anything else."""
    shapes = {slot.shape: name for name, slot in slots.items() if not slot.shared}
    up, down = shapes.get(("outputs", "rank")), shapes.get(("rank", "inputs"))
    return None if up is None or down is None or len(slots) != 2 else (up, down)


def trained_numbers(slots: Slots, rank: int, shape: Shape) -> int:
    """How many numbers a module trains in these slots.

    >>> pair = {"A": Slot(("rank", "inputs")), "B": Slot(("outputs", "rank"))}
    >>> trained_numbers(pair, 2, Shape(outputs=3, inputs=5))
    16
    """
    return sum(math.prod(slot.sizes(rank, shape)) for slot in slots.values() if slot.trained)
