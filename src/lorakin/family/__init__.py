"""The members of the family, what a member is, and how members combine."""

from lorakin.family.composition import AXES, Method, conflict
from lorakin.family.member import (
    AdaptedModule,
    Member,
    Modifier,
    Parametrisation,
    Role,
    Rule,
    Target,
)
from lorakin.family.members import (
    FAMILY,
    AdaLoRA,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRADrop,
    LoRAFA,
    LoRAPlus,
    VeRA,
)
from lorakin.family.pair import Chain, Pair, Shape, Weight, all_finite, widened
from lorakin.family.registry import member_named, members, register
from lorakin.family.words import method_named

__all__ = [
    "AXES",
    "FAMILY",
    "AdaLoRA",
    "AdaptedModule",
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
    "Role",
    "Rule",
    "Shape",
    "Target",
    "VeRA",
    "Weight",
    "all_finite",
    "conflict",
    "member_named",
    "members",
    "method_named",
    "register",
    "widened",
]
