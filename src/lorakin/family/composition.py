"""Which members combine, and on which pair.

Every member declares the axes on which it decides something. Members that decide on different axes
combine. Two that decide on one axis do not, and the error quotes both declarations. So legality is
data, and this file names no member: if no member brings a pair, the registry's first is used.
"""

from __future__ import annotations

import difflib
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
    """The members of a method in the order in which they act, and its pair.

    Raises:
        SettingError: something is no member, members do not combine, or their settings contradict
            each other.
    """
    members = ordered(_listed(given))
    for n, one in enumerate(members):
        for other in members[n + 1 :]:
            if reason := refusal_of_both(one, other):
                raise SettingError(reason)
    modifiers = [member for member in members if isinstance(member, Modifier)]
    pairs = [member for member in members if isinstance(member, Parametrisation)]
    if len(pairs) > 1:
        raise SettingError(
            f"{pairs[0].word} and {pairs[1].word} do not combine: each brings a pair of its own"
        )
    named = pairs[0] if pairs else None
    kind = type(named) if named is not None else needed_pair(modifiers)
    for member in modifiers:
        if reason := member.refusal_of_pair(kind):
            raise SettingError(f"{member.word} and {kind.word} do not combine: {reason}")
    pair = _pair(named, kind, modifiers)
    gaining = [m.word for m in dict.fromkeys((pair, *members)) if overrides(m, "gain")]
    if len(gaining) > 1:
        first, second = gaining[:2]
        raise SettingError(f"{first} and {second} do not combine: both set a gain for each output")
    return members, pair


def _listed(given: Any) -> list[Member]:
    """The members as a list; `SettingError` if there are none or one is no member."""
    several = isinstance(given, Iterable) and not isinstance(given, str | type)
    members: list[Any] = list(given) if several else [given]
    for one in members:
        if not isinstance(one, Member):
            raise SettingError(
                f"expected a member with its settings, such as lk.LoRA(rank=16), not {one!r}"
            )
        _check_class(type(one))
    require(bool(members), "a method needs at least one member, such as lk.LoRA(rank=16)")
    return members


def _check_class(member: type[Member]) -> None:
    """Raise `SettingError` if a member's class is not what `Member` says."""
    parameters = getattr(member, "__dataclass_params__", None)
    require(
        parameters is not None and parameters.frozen,
        f"{member.__name__} must be a frozen dataclass: put @dataclass(frozen=True) above it",
    )
    for axis in member.decides:
        near = difflib.get_close_matches(axis, AXES, n=1, cutoff=0.8)
        require(
            axis in AXES or not near,
            f"{member.__name__} decides {axis!r}; did you mean {''.join(near)!r}? An axis of its "
            "own needs a name that is not so near",
        )


def ordered(members: Iterable[Member]) -> tuple[Member, ...]:
    """The members in the order of their axes.

    Those on an axis of their own come before a gain, which is over all that the others make.
    """
    order = {axis: float(n) for n, axis in enumerate(AXES)}
    own = order["gain"] - 0.5
    return tuple(sorted(members, key=lambda m: min(order.get(axis, own) for axis in m.decides)))


def refusal_of_both(one: Member, other: Member) -> str | None:
    """Why the declarations of two members do not combine; None if they do."""
    if one.word == other.word:
        return f"{one.word} is given twice; give it once, with all its settings"
    for axis in (axis for axis in one.decides if axis in other.decides):
        return (
            f"{one.word} and {other.word} do not combine: both decide {AXES.get(axis, axis)} "
            f"({one.word}: {one.decides[axis]}; {other.word}: {other.decides[axis]})"
        )
    return None


def needed_pair(modifiers: Sequence[Modifier]) -> type[Parametrisation]:
    """The parametrisation that a modifier needs, else the usual one."""
    needed = (kind for member in modifiers if (kind := member.default_pair()) is not None)
    return next(needed, default_pair())


def _pair_settings(modifiers: Sequence[Modifier]) -> dict[str, Any]:
    """The pair's settings that the modifiers give; they share one pair, so they must agree."""
    said: dict[str, tuple[Any, str]] = {}
    for member in modifiers:
        for name in member.pair_settings:
            value = getattr(member, name)
            if value is None:
                continue
            if name in said and said[name][0] != value:
                raise SettingError(
                    f"{said[name][1]} has {name}={said[name][0]!r} and {member.word} has {name}="
                    f"{value!r}, but they share one pair; give it once"
                )
            said[name] = (value, member.word)
    return {name: value for name, (value, _) in said.items()}


def _pair(
    named: Parametrisation | None, kind: type[Parametrisation], modifiers: Sequence[Modifier]
) -> Parametrisation:
    """The named parametrisation, or a new one of this `kind` with the modifiers' settings."""
    settings = _pair_settings(modifiers)
    known = kind.setting_names()
    if unknown := [name for name in settings if name not in known and settings[name]]:
        said = f"{unknown[0]}={settings[unknown[0]]!r}"
        raise SettingError(f"{kind.word} has no {unknown[0]}, so {said} cannot apply")
    settings = {name: value for name, value in settings.items() if name in known}
    if named is None:
        defaults = {n: v for m in modifiers for n, v in m.pair_defaults.items() if n in known}
        return kind(**(defaults | settings))
    for name, value in settings.items():
        if value != getattr(named, name):
            raise SettingError(
                f"{named.word} has {name}={getattr(named, name)!r}, but another member says "
                f"{name}={value!r}; give it to {named.word} alone"
            )
    return named
