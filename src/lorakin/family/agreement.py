"""Whether two methods are one: what they compute and how they train, not how they are spelt."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from lorakin.family.member import Modifier, Parametrisation

if TYPE_CHECKING:
    from lorakin.family.method import Method

COMPUTING = ("gain", "amend_pair", "beside_pair", "share")
"""The hooks by which a modifier takes part in what is computed; the others act while training alone."""


def are_one(one: Method, other: Method, training: bool = True) -> bool:
    """Whether the methods are the same, but for settings that one of them leaves open and for how their pairs start.

    Without `training` it is enough that they compute the same from the same tensors.
    """
    if type(one.parametrisation) is not type(other.parametrisation):
        return False
    aside = one.parametrisation.of_no_account | (set() if training else {"dropout"})
    if not _same(one.parametrisation, other.parametrisation, aside):
        return False
    mine, its = (
        {m.word: m for m in method.modifiers if training or _computes(m)} for method in (one, other)
    )
    return mine.keys() == its.keys() and all(
        _same(mine[word], its[word], {*mine[word].pair_settings}) for word in mine
    )


def _computes(member: Modifier) -> bool:
    return any(getattr(type(member), hook) is not getattr(Modifier, hook) for hook in COMPUTING)


def _same(
    one: Parametrisation | Modifier, other: Parametrisation | Modifier, aside: Set[str]
) -> bool:
    """Whether all settings but those `aside` are equal, where neither is open."""
    values = ((getattr(one, name), getattr(other, name)) for name in one.setting_names() - aside)
    return all(mine is None or its is None or mine == its for mine, its in values)
