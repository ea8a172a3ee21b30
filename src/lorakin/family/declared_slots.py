"""Whether the tensors that a method starts are those that its members declare as slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorakin.errors import SettingError
from lorakin.family.change import Chain, LowRank
from lorakin.family.pair import Shape, Tensors
from lorakin.family.precision import all_finite
from lorakin.family.weight import has_no_values

if TYPE_CHECKING:
    from lorakin.family.method import Method


def check_declared(method: Method, path: str, shape: Shape, tensors: Tensors) -> None:
    """Checks that the members start what their slots declare, in those shapes.

    Raises:
        SettingError: they do not.
    """
    slots = method.slots_at(path, shape)
    if undeclared := [name for name in tensors if name not in slots]:
        raise SettingError(
            f"{method.words} starts a tensor {undeclared[0]!r}, but its slots are "
            f"{', '.join(slots) or 'none'}; declare it there"
        )
    slots_of_pair = method.parametrisation.slots_at(shape)
    needed = [name for name, slot in slots.items() if slot.trained or name in slots_of_pair]
    if missing := [name for name in needed if name not in tensors]:
        raise SettingError(f"{method.words} declares a slot {missing[0]!r} and does not start it")

    rank = getattr(method.parametrisation, "rank", None)
    for name, tensor in tensors.items():
        if not slots[name].fits(tensor.shape, rank, shape):
            raise SettingError(
                f"{method.words} declares a slot {name!r} of shape {slots[name].shape} and starts "
                f"a tensor {tuple(tensor.shape)} on {path}, which is {shape.outputs} × "
                f"{shape.inputs}"
            )
        if slots[name].starts_at_zero and not has_no_values(tensor) and tensor.any():
            raise SettingError(
                f"{method.words} declares that its slot {name!r} starts at zero and starts it with "
                f"other values on {path}; start it with zeros, or declare starts_at_zero=False"
            )
    _check_change(method, path, shape, tensors)


def check_finite(method: Method, initial: Mapping[str, Tensors]) -> None:
    """Checks that no tensor of any module starts with NaN or infinity; shared ones once.

    Raises:
        SettingError: one does.
    """
    seen: set[int] = set()
    for path, tensors in initial.items():
        for name, tensor in tensors.items():
            if id(tensor) in seen or has_no_values(tensor):
                continue
            seen.add(id(tensor))
            if not all_finite(tensor):
                raise SettingError(
                    f"{method.words} starts the slot {name!r} on {path} with NaN or infinity; does "
                    "the base weight, or what was measured, hold some?"
                )


def _check_change(method: Method, path: str, shape: Shape, tensors: Tensors) -> None:
    """Checks that the pair's change is one of the forms, and fits the weight.

    Raises:
        SettingError: it is not, or does not.
    """
    pair = method.parametrisation
    change = pair.change(tensors)
    if isinstance(change, Chain):
        return
    if not isinstance(change, LowRank):
        raise SettingError(
            f"the change of {pair.word} is a {type(change).__name__}; return a LowRank or a Chain"
        )
    got = (*change.up.shape[:1], *change.down.shape[1:])
    if got != (shape.outputs, shape.inputs) or change.up.shape[1] != len(change.down):
        raise SettingError(
            f"the change of {pair.word} on {path} has up {tuple(change.up.shape)} and down "
            f"{tuple(change.down.shape)}; expected ({shape.outputs}, k) and (k, {shape.inputs})"
        )
