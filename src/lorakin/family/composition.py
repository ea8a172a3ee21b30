"""Which members combine, and on which pair.

Every member declares the axes on which it decides something. Members that decide on different axes
combine. Two that decide on one axis do not, and the error quotes both declarations. This file names
no member: if no member brings a pair, the registry's first parametrisation is used.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from lorakin.errors import SettingError
from lorakin.family.member import Member, Modifier, Parametrisation, overrides
from lorakin.family.registry import default_pair
from lorakin.family.settings import require

AXES = {
    "parametrisation": "where the pair comes from",
    "projection": "whether its random factor trains",
    "start": "where the pair begins",
    "rates": "who learns how fast",
    "budget": "where ranks go while training",
    "sharing": "which modules share a pair",
    "base": "whether the base weight moves",
    "gain": "whether each output has a trained length",
}
"""What members decide, in the order in which they act. A member may have an axis of its own."""


def composed(given: Any) -> tuple[tuple[Member, ...], Parametrisation]:
    """Returns the members of a method in the order in which they act, and its pair.

    Raises:
        SettingError: something is not a member, members do not combine, or their settings
            contradict each other.
    """
    members = ordered(_listed(given))
    for first, second in itertools.combinations(members, 2):
        if reason := refusal_of_both(first, second):
            raise SettingError(reason)
    modifiers = [member for member in members if isinstance(member, Modifier)]
    pairs = [member for member in members if isinstance(member, Parametrisation)]
    if len(pairs) > 1:
        raise SettingError(
            f"{pairs[0].word} and {pairs[1].word} do not combine: each brings a pair of its own"
        )
    given_pair = pairs[0] if pairs else None
    pair_class = type(given_pair) if given_pair is not None else needed_pair(modifiers)
    for member in modifiers:
        if reason := member.refusal_of_pair(pair_class):
            raise SettingError(f"{member.word} and {pair_class.word} do not combine: {reason}")
    pair = _pair(given_pair, pair_class, modifiers)
    with_gain = [m.word for m in dict.fromkeys((pair, *members)) if overrides(m, "gain")]
    if len(with_gain) > 1:
        raise SettingError(
            f"{with_gain[0]} and {with_gain[1]} do not combine: both set a gain for each output"
        )
    return members, pair


def _listed(given: Any) -> list[Member]:
    """Returns the members as a list.

    Raises:
        SettingError: there are none, or one is not a member.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str | type)
    members: list[Any] = list(given) if several else [given]
    for member in members:
        if not isinstance(member, Member):
            raise SettingError(
                f"expected a member with its settings, such as lk.LoRA(rank=16), not {member!r}"
            )
        _check_class(type(member))
    require(bool(members), "a method needs at least one member, such as lk.LoRA(rank=16)")
    return members


def _check_class(member: type[Member]) -> None:
    """Checks that a member's class is what `Member` says.

    Raises:
        SettingError: it is not.
    """
    parameters = getattr(member, "__dataclass_params__", None)
    require(
        parameters is not None and parameters.frozen,
        f"{member.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it",
    )
    for axis in member.decides:
        similar = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.8)
        require(
            axis in AXES or not similar,
            f"{member.__name__} decides {axis!r}; did you mean {''.join(similar)!r}? An axis of "
            "its own needs a name that is less similar",
        )


def ordered(members: Iterable[Member]) -> tuple[Member, ...]:
    """Returns the members in the order of their axes.

    Those on an axis that is not in `AXES` come before a gain, which multiplies all other changes.
    """
    order = {axis: float(n) for n, axis in enumerate(AXES)}
    before_gain = order["gain"] - 0.5
    return tuple(
        sorted(members, key=lambda m: min(order.get(axis, before_gain) for axis in m.decides))
    )


def refusal_of_both(first: Member, second: Member) -> str | None:
    """Returns why the declarations of two members do not combine; None if they do."""
    if first.word == second.word:
        return f"{first.word} is given twice; give it once, with all its settings"
    axis = next((axis for axis in first.decides if axis in second.decides), None)
    if axis is None:
        return None
    return (
        f"{first.word} and {second.word} do not combine: both decide {AXES.get(axis, axis)} "
        f"({first.word}: {first.decides[axis]}; {second.word}: {second.decides[axis]})"
    )


def needed_pair(modifiers: Sequence[Modifier]) -> type[Parametrisation]:
    """Returns the parametrisation that a modifier needs, else the usual one."""
    pair_classes = (member.default_pair() for member in modifiers)
    return next((cls for cls in pair_classes if cls is not None), default_pair())


def _pair_settings(modifiers: Sequence[Modifier]) -> dict[str, Any]:
    """Returns the pair's settings that the modifiers give.

    Raises:
        SettingError: two modifiers, which share one pair, give it different settings.
    """
    given: dict[str, tuple[Any, str]] = {}
    for member in modifiers:
        for name in member.pair_settings:
            value = getattr(member, name)
            if value is None:
                continue
            first, owner = given.get(name, (value, member.word))
            if first != value:
                raise SettingError(
                    f"{owner} has {name}={first!r} and {member.word} has {name}={value!r}, but "
                    "they share one pair; give it once"
                )
            given[name] = (value, member.word)
    return {name: value for name, (value, _) in given.items()}


def _pair(
    given: Parametrisation | None,
    pair_class: type[Parametrisation],
    modifiers: Sequence[Modifier],
) -> Parametrisation:
    """Returns the given parametrisation, or a new one with the modifiers' settings.

    Raises:
        SettingError: the modifiers' settings do not fit it.
    """
    settings = _pair_settings(modifiers)
    names = pair_class.setting_names()
    if unknown := [name for name in settings if name not in names and settings[name]]:
        setting = f"{unknown[0]}={settings[unknown[0]]!r}"
        raise SettingError(f"{pair_class.word} has no {unknown[0]}, so {setting} cannot apply")
    settings = {name: value for name, value in settings.items() if name in names}
    if given is None:
        defaults = {n: v for m in modifiers for n, v in m.pair_defaults.items() if n in names}
        return pair_class(**(defaults | settings))
    for name, value in settings.items():
        if value != getattr(given, name):
            raise SettingError(
                f"{given.word} has {name}={getattr(given, name)!r}, but another member says "
                f"{name}={value!r}; give it to {given.word} alone"
            )
    return given
