"""Methods from words, as people write them on the command line: `dora,lora+`, `all`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.errors import SettingError
from lorakin.family.member import Parametrisation
from lorakin.family.method import Method
from lorakin.family.registry import member_named, members


def method_named(words: str, settings: Mapping[str, Any]) -> Method:
    """The method of the members in `words`; each setting goes to the members that have it.

    >>> method_named("dora,lora+", {"rank": 4, "ratio": 8}).words
    'lora+,dora'

    Raises:
        SettingError: an unknown member or setting, a value outside its range, or members that do
            not combine.
    """
    if not all(word.strip() for word in words.split(",")):
        raise SettingError(
            f"method {words!r} has a comma with no member beside it; expected words such as "
            "dora,lora+"
        )
    kinds = [member_named(word.strip()) for word in words.split(",")]
    fields = {kind: kind.setting_names() for kind in members()}
    for name in settings:
        if not any(name in fields[kind] for kind in kinds):
            known = ", ".join(sorted(set().union(*(fields[kind] for kind in kinds))))
            owners = [kind.word for kind in members() if name in fields[kind]]
            elsewhere = f"; {name} is a setting of {', '.join(owners)}" if owners else ""
            raise SettingError(
                f"method {words!r} has no setting {name!r}; it has: {known}{elsewhere}"
            )
    pair = next((kind for kind in kinds if issubclass(kind, Parametrisation)), None)
    # The pair's settings go only to the member that brings it.
    taken = fields[pair] if pair is not None else frozenset[str]()
    given = [fields[kind] if kind is pair else fields[kind] - taken for kind in kinds]
    return Method.of(
        [
            kind(**{name: value for name, value in settings.items() if name in own})
            for kind, own in zip(kinds, given, strict=True)
        ]
    )


def methods_of(words: str) -> list[str]:
    """The methods in `words`: `all`, or words like `dora,lora+` separated by spaces or semicolons.

    >>> methods_of("lora; dora,lora+")
    ['lora', 'dora,lora+']

    Raises:
        SettingError: no method, an unknown member, or a method given twice.
    """
    if words.strip() == "all":
        return [member.word for member in members()]
    found = [word.strip(",") for word in re.split(r"[;\s]+", words) if word.strip(",")]
    if not found:
        raise SettingError(
            f"--methods {words!r} names no method; expected all, or such as "
            "'dora vera dora,adalora'"
        )
    if twice := [word for n, word in enumerate(found) if word in found[:n]]:
        raise SettingError(f"--methods names {twice[0]} twice")
    for word in found:
        for member in word.split(","):
            member_named(member.strip())
    return found


def settings_by_method(
    methods: Sequence[str], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Method → those of the settings `given` that one of its members has.

    Raises:
        SettingError: a setting that no method has.
    """
    names = {
        word: frozenset().union(*(member_named(m.strip()).setting_names() for m in word.split(",")))
        for word in methods
    }
    for name in given:
        if not any(name in known for known in names.values()):
            method_named(methods[-1], {name: given[name]})  # raises: no such setting
    return {
        word: {name: value for name, value in given.items() if name in known}
        for word, known in names.items()
    }


def fair_settings(words: str, rank: int, scaling: float, steps: int) -> dict[str, Any]:
    """Returns a method's settings in a comparison with others of one rank and scale.

    `Member.comparable_settings` gives each member's.

    >>> fair_settings("lora", rank=4, scaling=2.0, steps=100)
    {'rank': 4, 'alpha': 8.0}
    """
    comparable = [
        member_named(word.strip()).comparable_settings(rank, scaling, steps)
        for word in words.split(",")
    ]
    lacking = {name for settings in comparable for name, value in settings.items() if value is None}
    # Later ones win, so a member that has settings of its own instead comes last.
    comparable.sort(key=lambda settings: None in settings.values())
    return {
        name: value
        for settings in comparable
        for name, value in settings.items()
        if name not in lacking
    }


def axes_of(words: str) -> set[str]:
    """The axes on which the members of a method decide something."""
    return {axis for word in words.split(",") for axis in member_named(word.strip()).decides}
