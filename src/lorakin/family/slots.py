"""Slots: the tensors that a member puts on each module, declared as data.

    slots = {
        "A": Slot(("rank", "inputs")),
        "B": Slot(("outputs", "rank"), starts_at_zero=True),
    }

Whatever else needs to know a member's tensors follows from its slots: which train and decay, which
LoRA+ speeds up, which ranks can be freed, how many parameters there are, and their names in PEFT's
files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    """Whether it starts at zero, which makes the change zero."""
    decays: bool = True
    """Whether weight decay may act on it."""
    shared: bool = False
    """Whether all modules use one tensor, as large as the largest module needs."""
    belongs_to_pair: bool = True
    """Whether it belongs to the pair: modules that share a pair share it too."""
    is_random_factor: bool = False
    """Whether it is the pair's random factor, which LoRA-FA freezes."""
    peft: str = ""
    """Its name in PEFT's files: what follows the module's path or, if shared, the whole key."""
    rate_factor: float = 1.0
    """The factor on the adapter's learning rate."""
    fixed_lr: float | None = None
    """A learning rate of its own, instead of the adapter's times `rate_factor`."""

    def sizes(self, rank: int, shape: Shape) -> tuple[int, ...]:
        """Returns its sizes on a weight of this shape, at this rank.

        >>> Slot(("outputs", "rank")).sizes(4, Shape(outputs=10, inputs=20))
        (10, 4)
        """
        sizes = {"rank": rank, "inputs": shape.inputs, "outputs": shape.outputs}
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.shape)

    def fits(self, shape: Sequence[int], rank: int | None, weight_shape: Shape) -> bool:
        """Returns whether a tensor of this shape fits the slot on a weight of `weight_shape`.

        An empty tensor fits. A shared one may be larger. Without a `rank`, any rank fits.

        >>> Slot(("outputs", "rank")).fits((10, 4), 4, Shape(outputs=10, inputs=20))
        True
        """
        if 0 in shape:
            return True
        sizes = {"rank": rank, "inputs": weight_shape.inputs, "outputs": weight_shape.outputs}
        declared = [size if isinstance(size, int) else sizes.get(size, -1) for size in self.shape]
        return len(shape) == len(declared) and all(
            expected is None or size == expected or (self.shared and size >= expected)
            for size, expected in zip(shape, declared, strict=True)
        )

    def rate_at(self, lr: float) -> float:
        """Returns the learning rate of its tensor where the adapter's is `lr`."""
        return self.fixed_lr if self.fixed_lr is not None else self.rate_factor * lr

    @property
    def rank_axis(self) -> int | None:
        """The dimension that has an entry for each rank; None if there is not exactly one."""
        axes = [axis for axis, size in enumerate(self.shape) if size == "rank"]
        return axes[0] if len(axes) == 1 else None

    @property
    def is_one_per_rank(self) -> bool:
        """Whether it holds one element for each rank and nothing else."""
        return self.rank_axis is not None and all(size in ("rank", 1) for size in self.shape)


Slots = Mapping[str, Slot]
"""A member's slots by their names."""


def frozen(slots: Slots) -> dict[str, Slot]:
    """Returns the same slots, none of them trained."""
    return {name: dataclasses.replace(slot, trained=False) for name, slot in slots.items()}


def rank_switch(slots: Slots) -> str | None:
    """Returns the trained slot that can switch off a single rank: E of P·E·Q, VeRA's d."""
    return next((n for n, slot in slots.items() if slot.is_one_per_rank and slot.trained), None)


def rank_factors(slots: Slots) -> dict[str, int]:
    """Returns the slots whose ranks the `rank_switch` switches, and the axis of the ranks in each.

    Empty if ranks cannot be freed: if modules share a tensor, the others still need its ranks.
    """
    axes = {
        name: slot.rank_axis
        for name, slot in slots.items()
        if slot.belongs_to_pair and not slot.is_one_per_rank and slot.rank_axis is not None
    }
    return {} if any(slots[name].shared for name in axes) else axes


def factors_of(slots: Slots) -> tuple[str, str] | None:
    """Returns the slots (up, down) of a plain product up·down; None for any other change."""
    shapes = {slot.shape: name for name, slot in slots.items() if not slot.shared}
    up, down = shapes.get(("outputs", "rank")), shapes.get(("rank", "inputs"))
    return None if up is None or down is None or len(slots) != 2 else (up, down)
