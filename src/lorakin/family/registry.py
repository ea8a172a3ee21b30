"""Which members there are: lorakin's own, and those that a program or another package adds.

A class becomes a member by a decorator, wherever it is written:

    @lorakin.register
    @dataclass(frozen=True)
    class MyMember(Parametrisation): ...

A package that brings members names their classes as entry points, so that the command finds them:

    [project.entry-points."lorakin.members"]
    my-member = "my_package:MyMember"
"""

from __future__ import annotations

import difflib
import warnings
from importlib.metadata import entry_points
from typing import TypeVar

from lorakin.errors import LorakinWarning, SettingError
from lorakin.family.member import Member, Parametrisation

GROUP = "lorakin.members"
"""The group of the entry points that name members."""

M = TypeVar("M", bound=type[Member])
_MEMBERS: dict[str, type[Member]] = {}
_searched: list[bool] = []


def register(member: M) -> M:
    """Add a class to the family under its `word`. Returns the class, so use it as a decorator.

    >>> import lorakin as lk
    >>> lk.register(lk.LoRA) is lk.LoRA  # a second time changes nothing
    True

    Raises:
        SettingError: it is no member, or its word belongs to another member.
    """
    if not (
        isinstance(member, type)
        and issubclass(member, Member)
        and isinstance(getattr(member, "word", None), str)
    ):
        raise SettingError(f"expected a class of Member that has a word, not {member!r}")
    known = _MEMBERS.setdefault(member.word, member)
    if known is not member and (known.__module__, known.__qualname__) != (
        member.__module__,
        member.__qualname__,
    ):
        where = f"{known.__module__}.{known.__qualname__}"
        raise SettingError(
            f"{where} already has the word {member.word!r}; give {member.__qualname__} another"
        )
    _MEMBERS[member.word] = member  # a notebook cell that runs again defines its class anew
    return member


def members() -> tuple[type[Member], ...]:
    """All members, lorakin's own first, in the order of the family."""
    if not _searched:
        _searched.append(True)
        for entry in entry_points(group=GROUP):
            try:
                register(entry.load())
            except Exception as error:  # a stranger's package may fail in any way
                warnings.warn(
                    f"the member {entry.name!r} of the package {entry.value.partition(':')[0]!r} "
                    f"cannot be used: {error!r}. Mend or uninstall that package",
                    LorakinWarning,
                    stacklevel=2,
                )
    return tuple(_MEMBERS.values())


def member_named(word: str) -> type[Member]:
    """The member whose command-line word is `word`.

    >>> member_named("dora").__name__
    'DoRA'

    Raises:
        SettingError: there is none; the message lists those there are.
    """
    words = {member.word: member for member in members()}
    if word in words:
        return words[word]
    near = difflib.get_close_matches(word.lower(), words, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    raise SettingError(f"unknown method {word!r}{meant}; this version has: {', '.join(words)}")


def default_pair() -> type[Parametrisation]:
    """The pair of a method whose members bring and need none: the family's first."""
    return next(member for member in _MEMBERS.values() if issubclass(member, Parametrisation))
