"""Whether two methods are the same in what they compute and how they train, however spelt.

`lk.LoRAPlus(rank=8)` and `[lk.LoRA(rank=8), lk.LoRAPlus()]` are one method. An adapter's file says
one spelling and a user another; resuming and loading ask here whether they mean the same.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from lorakin.family.member import Modifier, Parametrisation

if TYPE_CHECKING:
    from lorakin.family.method import Method

COMPUTING = ("gain", "amend_pair", "beside_pair", "share")
"""The hooks by which a modifier takes part in what is computed; all others act in training only."""


def same_method(one: Method, other: Method, training: bool = True) -> bool:
    """Whether two methods are the same.

    Settings that one of them leaves open and settings that only say how a pair starts are not
    compared. With `training=False` the methods need only compute the same from the same tensors.
    """
    if type(one.parametrisation) is not type(other.parametrisation):
        return False
    aside = one.parametrisation.not_compared | (set() if training else {"dropout"})
    if not _same(one.parametrisation, other.parametrisation, aside):
        return False
    mine, its = (
        {m.word: m for m in method.modifiers if training or _computes(m)} for method in (one, other)
    )
    return mine.keys() == its.keys() and all(
        _same(mine[word], its[word], {*mine[word].pair_settings}) for word in mine
    )


def _computes(member: Modifier) -> bool:
    """Whether a modifier takes part in what is computed."""
    return any(getattr(type(member), hook) is not getattr(Modifier, hook) for hook in COMPUTING)


def _same(
    one: Parametrisation | Modifier, other: Parametrisation | Modifier, aside: Set[str]
) -> bool:
    """Whether all settings are equal, except those in `aside` and those that one leaves open."""
    values = ((getattr(one, name), getattr(other, name)) for name in one.setting_names() - aside)
    return all(mine is None or its is None or mine == its for mine, its in values)
