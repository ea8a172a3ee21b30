"""The members of the family, what a member is, and how members combine."""

from lorakin.family.change import Chain, Change, LowRank
from lorakin.family.composition import AXES
from lorakin.family.measure import GRADIENTS, INPUTS, WEIGHT, Collector, UnadaptedModule
from lorakin.family.member import Member, Modifier, Parametrisation
from lorakin.family.members import *  # noqa: F403 - members.py lists the names
from lorakin.family.members import FAMILY
from lorakin.family.members import __all__ as _members
from lorakin.family.method import Method, refusal_of_members
from lorakin.family.method_words import method_named
from lorakin.family.pair import Pair, Shape
from lorakin.family.precision import all_finite, widened
from lorakin.family.registry import member_named, members, register
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.slots import Slot, Slots
from lorakin.family.start import AnchoredStart, Start
from lorakin.family.weight import FrozenWeight

__all__ = [
    "AXES",
    "FAMILY",
    "GRADIENTS",
    "INPUTS",
    "WEIGHT",
    "AdaptedModule",
    "AnchoredStart",
    "Chain",
    "Change",
    "Collector",
    "FrozenWeight",
    "LowRank",
    "Member",
    "Method",
    "Modifier",
    "Pair",
    "Parametrisation",
    "Rule",
    "Shape",
    "Slot",
    "Slots",
    "Start",
    "UnadaptedModule",
    "all_finite",
    "member_named",
    "members",
    "method_named",
    "refusal_of_members",
    "register",
    "widened",
]
__all__ += _members
