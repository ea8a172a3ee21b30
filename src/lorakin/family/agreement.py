"""Whether two methods are the same in what they compute and how they train, however spelt.

`lk.LoRAPlus(rank=8)` and `[lk.LoRA(rank=8), lk.LoRAPlus()]` are one method. An adapter's file says
one spelling and a user another; resuming and loading ask here whether they mean the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakin.family.member import COMPUTING, Modifier, Parametrisation, overrides

if TYPE_CHECKING:
    from lorakin.family.method import Method


class Difference(NamedTuple):
    """The first thing in which two methods differ: a setting, or "method", and both values."""

    setting: str
    first: Any
    second: Any


def difference(first: Method, second: Method, training: bool = True) -> Difference | None:
    """Returns the first difference between two methods; None if they are the same.

    Settings that one of them leaves open, and settings that do not change what the pair computes
    (`Parametrisation.not_compared`), are not compared. With `training=False` the methods need only
    compute the same from the same tensors.
    """
    pair, other_pair = first.parametrisation, second.parametrisation
    modifiers, other_modifiers = _modifiers(first, training), _modifiers(second, training)
    if type(pair) is not type(other_pair) or modifiers.keys() != other_modifiers.keys():
        return Difference("method", first.words, second.words)
    ignored = pair.not_compared | (set() if training else {"dropout"})
    differences = [
        _different_setting(pair, other_pair, ignored),
        *(
            _different_setting(member, other_modifiers[word], {*member.pair_settings})
            for word, member in modifiers.items()
        ),
    ]
    return next((found for found in differences if found is not None), None)


def _modifiers(method: Method, training: bool) -> dict[str, Modifier]:
    """Returns the method's modifiers by word; without `training` those that compute."""
    return {
        member.word: member
        for member in method.modifiers
        if training or any(overrides(member, hook) for hook in COMPUTING)
    }


def _different_setting(
    first: Parametrisation | Modifier, second: Parametrisation | Modifier, ignored: Set[str]
) -> Difference | None:
    """Returns the first setting that differs; ignored and open ones are not compared."""
    for name in (field.name for field in dataclasses.fields(first)):  # type: ignore[arg-type]
        value, other_value = getattr(first, name), getattr(second, name)
        if name in ignored or value is None or other_value is None:
            continue
        if value != other_value:
            return Difference(name, value, other_value)
    return None
