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

import re
import warnings
from importlib.metadata import entry_points
from typing import TypeVar

from lorakin.errors import LorakinWarning, SettingError
from lorakin.family.member import Member, Parametrisation
from lorakin.family.settings import did_you_mean

GROUP = "lorakin.members"
"""The group of the entry points that name members."""

WORD = re.compile(r"[a-z][a-z0-9+-]*")
RESERVED = ("all",)

M = TypeVar("M", bound=type[Member])
_MEMBERS: dict[str, type[Member]] = {}
_entry_points_loaded = False


def register(member: M) -> M:
    """Adds a class to the family under its `word`, and returns it: use it as a decorator.

    >>> import lorakin as lk
    >>> lk.register(lk.LoRA) is lk.LoRA  # a second time changes nothing
    True

    Raises:
        SettingError: it is not a member, its word belongs to another member, or is no word.
    """
    if not (
        isinstance(member, type)
        and issubclass(member, Member)
        and isinstance(getattr(member, "word", None), str)
    ):
        raise SettingError(f"expected a class of Member that has a word, not {member!r}")
    if not WORD.fullmatch(member.word) or member.word in RESERVED:
        raise SettingError(
            f"{member.__qualname__} cannot have the word {member.word!r}: a word begins with a "
            "small letter and has small letters, digits, + and -; --method splits at commas, and "
            "'all' means all members"
        )
    holder = _MEMBERS.setdefault(member.word, member)
    if (holder.__module__, holder.__qualname__) != (member.__module__, member.__qualname__):
        where = f"{holder.__module__}.{holder.__qualname__}"
        raise SettingError(
            f"{where} already has the word {member.word!r}; give {member.__qualname__} another"
        )
    _MEMBERS[member.word] = member  # a notebook cell that runs again defines its class again
    return member


def members() -> tuple[type[Member], ...]:
    """Returns all members, lorakin's own first, in the order of the family.

    >>> [member.word for member in members()][:3]
    ['lora', 'lora+', 'lora-fa']
    """
    global _entry_points_loaded
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for entry in entry_points(group=GROUP):
            try:
                register(entry.load())
            except Exception as error:  # another package may fail in any way
                warnings.warn(
                    f"the member {entry.name!r} of the package {entry.value.partition(':')[0]!r} "
                    f"cannot be used: {error!r}. Repair or uninstall that package",
                    LorakinWarning,
                    stacklevel=2,
                )
    return tuple(_MEMBERS.values())


def member_named(word: str) -> type[Member]:
    """Returns the member whose command-line word is `word`.

    >>> member_named("dora").__name__
    'DoRA'

    Raises:
        SettingError: there is none; the message lists all members.
    """
    words = {member.word: member for member in members()}
    if word in words:
        return words[word]
    hint = did_you_mean(word, words)
    raise SettingError(f"unknown method {word!r}{hint}; this version has: {', '.join(words)}")


def default_pair() -> type[Parametrisation]:
    """Returns the pair of a method whose members bring and need none: the family's first."""
    return next(member for member in _MEMBERS.values() if issubclass(member, Parametrisation))
