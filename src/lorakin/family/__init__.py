"""The members, in order of complexity. A new one is a file here and a line in `FAMILY`."""

from lorakin.errors import SettingError
from lorakin.family.lora import LoRA
from lorakin.family.member import Member, Pair, Shape

FAMILY: tuple[type[Member], ...] = (LoRA,)


def member_named(word: str) -> type[Member]:
    """The member whose command-line word is `word`.

    Raises:
        SettingError: there is none; the message lists those there are.
    """
    for member in FAMILY:
        if member.word == word:
            return member
    raise SettingError(f"unknown method {word!r}; this version has: {', '.join(m.word for m in FAMILY)}")


__all__ = ["FAMILY", "LoRA", "Member", "Pair", "Shape", "member_named"]
