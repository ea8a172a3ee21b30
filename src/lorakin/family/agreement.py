"""Whether two methods are the same in what they compute and how they train, however spelt.

`lk.LoRAPlus(rank=8)` and `[lk.LoRA(rank=8), lk.LoRAPlus()]` are one method. An adapter's file says
one spelling and a user another; resuming and loading ask here whether they mean the same.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from lorakin.family.member import COMPUTING, Modifier, Parametrisation, overrides

if TYPE_CHECKING:
    from lorakin.family.method import Method


def same_method(one: Method, other: Method, training: bool = True) -> bool:
    """Returns whether two methods are the same.

    Settings that one of them leaves open, and settings that do not change what the pair computes
    (`Parametrisation.not_compared`), are not compared. With `training=False` the methods need only
    compute the same from the same tensors.
    """
    if type(one.parametrisation) is not type(other.parametrisation):
        return False
    ignored = one.parametrisation.not_compared | (set() if training else {"dropout"})
    if not _same_settings(one.parametrisation, other.parametrisation, ignored):
        return False
    first, second = _modifiers(one, training), _modifiers(other, training)
    return first.keys() == second.keys() and all(
        _same_settings(first[word], second[word], {*first[word].pair_settings}) for word in first
    )


def _modifiers(method: Method, training: bool) -> dict[str, Modifier]:
    """Returns the method's modifiers by word; without `training` those that compute."""
    return {
        member.word: member
        for member in method.modifiers
        if training or any(overrides(member, hook) for hook in COMPUTING)
    }


def _same_settings(
    one: Parametrisation | Modifier, other: Parametrisation | Modifier, ignored: Set[str]
) -> bool:
    """Returns whether all settings agree, except ignored ones and those that one leaves open."""
    pairs = ((getattr(one, name), getattr(other, name)) for name in one.setting_names() - ignored)
    return all(first is None or second is None or first == second for first, second in pairs)
