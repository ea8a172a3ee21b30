"""The members, in order of complexity. A new one is a file here and a line in `FAMILY`."""

import difflib
from collections.abc import Mapping
from typing import Any

from lorakin.errors import SettingError
from lorakin.family.adalora import AdaLoRA
from lorakin.family.composition import AXES, Method, conflict
from lorakin.family.delta_lora import DeltaLoRA
from lorakin.family.dora import DoRA
from lorakin.family.lora import LoRA
from lorakin.family.lora_drop import LoRADrop
from lorakin.family.lora_fa import LoRAFA
from lorakin.family.lora_plus import LoRAPlus
from lorakin.family.member import Member, Modifier, Parametrisation, Place, Role, Rule, Spot
from lorakin.family.pair import Chain, Pair, Shape, Weight, all_finite, widened
from lorakin.family.vera import VeRA

FAMILY: tuple[type[Member], ...] = (LoRA, LoRAPlus, LoRAFA, VeRA, DoRA, AdaLoRA, LoRADrop, DeltaLoRA)


def member_named(word: str) -> type[Member]:
    """The member whose command-line word is `word`.

    Raises:
        SettingError: there is none; the message lists those there are.
    """
    words = {member.word: member for member in FAMILY}
    if word in words:
        return words[word]
    near = difflib.get_close_matches(word.lower(), words, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    raise SettingError(f"unknown method {word!r}{meant}; this version has: {', '.join(words)}")


def method_named(words: str, settings: Mapping[str, Any]) -> Method:
    """The method of the members in `words`, such as `dora,lora+`, with `settings` for whichever of them has one so named.

    Raises:
        SettingError: an unknown member or setting, a value outside its range, or members that do not combine.
    """
    if not all(word.strip() for word in words.split(",")):
        raise SettingError(f"method {words!r} has a comma without a member beside it; expected words such as dora,lora+")
    kinds = [member_named(word.strip()) for word in words.split(",")]
    fields = {kind: kind.setting_names() for kind in FAMILY}
    for name in settings:
        if not any(name in fields[kind] for kind in kinds):
            known = ", ".join(sorted(set().union(*(fields[kind] for kind in kinds))))
            owners = [kind.word for kind in FAMILY if name in fields[kind]]
            elsewhere = f"; {name} is a setting of {', '.join(owners)}" if owners else ""
            raise SettingError(f"method {words!r} has no setting {name!r}; it has: {known}{elsewhere}")
    pair = next((kind for kind in kinds if issubclass(kind, Parametrisation)), None)
    taken = (
        fields[pair] if pair is not None else frozenset[str]()
    )  # settings of the pair go to the member that brings it, alone
    given = [{k: v for k, v in settings.items() if k in fields[kind] and (kind is pair or k not in taken)} for kind in kinds]
    return Method.of([kind(**own) for kind, own in zip(kinds, given, strict=True)])


__all__ = [
    "AXES",
    "FAMILY",
    "AdaLoRA",
    "Chain",
    "DeltaLoRA",
    "DoRA",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "LoRAPlus",
    "Member",
    "Method",
    "Modifier",
    "Pair",
    "Parametrisation",
    "Place",
    "Role",
    "Rule",
    "Shape",
    "Spot",
    "VeRA",
    "Weight",
    "all_finite",
    "conflict",
    "member_named",
    "method_named",
    "widened",
]
