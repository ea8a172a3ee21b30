"""Methods from words, as people write them on the command line: `dora,lora+`, `all`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.errors import SettingError
from lorakin.family.member import Member, Parametrisation
from lorakin.family.method import Method
from lorakin.family.registry import member_named, members


def method_named(words: str, settings: Mapping[str, Any]) -> Method:
    """Returns the method of the members in `words`; each setting goes to the members that have it.

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
    classes = members_in(words)
    for name in settings:
        if not any(name in member.setting_names() for member in classes):
            raise _no_such_setting(words, name)
    pair = next((member for member in classes if issubclass(member, Parametrisation)), None)
    # The pair's settings go only to the member that brings it.
    pair_names = pair.setting_names() if pair is not None else frozenset[str]()
    chosen = []
    for member in classes:
        names = member.setting_names() - (frozenset() if member is pair else pair_names)
        chosen.append(member(**{name: settings[name] for name in settings if name in names}))
    return Method.of(chosen)


def members_in(words: str) -> list[type[Member]]:
    """Returns the members that a method's words name, such as `dora,lora+`.

    Raises:
        SettingError: a word names no member.
    """
    return [member_named(word.strip()) for word in words.split(",")]


def methods_of(text: str) -> list[str]:
    """Returns the methods in a text: `all`, or `dora,lora+` and the like between spaces or `;`.

    >>> methods_of("lora; dora,lora+")
    ['lora', 'dora,lora+']

    Raises:
        SettingError: no method, an unknown member, or a method given twice.
    """
    if text.strip() == "all":
        return [member.word for member in members()]
    methods = [words.strip(",") for words in re.split(r"[;\s]+", text) if words.strip(",")]
    if not methods:
        raise SettingError(
            f"--methods {text!r} names no method; expected all, or such as 'dora vera dora,adalora'"
        )
    if repeated := [words for n, words in enumerate(methods) if words in methods[:n]]:
        raise SettingError(f"--methods names {repeated[0]} twice")
    for words in methods:
        members_in(words)
    return methods


def settings_by_method(
    methods: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns method → those of the settings that one of its members has.

    Raises:
        SettingError: a setting that no method has.
    """
    names = {
        words: frozenset[str]().union(*(member.setting_names() for member in members_in(words)))
        for words in methods
    }
    for name in settings:
        if not any(name in of_method for of_method in names.values()):
            raise _no_such_setting(methods[-1], name)
    return {
        words: {name: value for name, value in settings.items() if name in of_method}
        for words, of_method in names.items()
    }


def _no_such_setting(words: str, name: str) -> SettingError:
    """Returns the error for a setting that no member of the method has."""
    names = sorted(set().union(*(member.setting_names() for member in members_in(words))))
    owners = [member.word for member in members() if name in member.setting_names()]
    elsewhere = f"; {name} is a setting of {', '.join(owners)}" if owners else ""
    return SettingError(
        f"method {words!r} has no setting {name!r}; it has: {', '.join(names)}{elsewhere}"
    )


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
    """Returns the axes on which the members of a method decide something."""
    return {axis for member in members_in(words) for axis in member.decides}
