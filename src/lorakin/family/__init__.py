"""The members of the family, what a member is, and how members combine."""

from lorakin.family.change import Chain, Change, LowRank
from lorakin.family.composition import AXES
from lorakin.family.measure import GRADIENTS, INPUTS, WEIGHT, Collector, Target
from lorakin.family.member import Member, Modifier, Parametrisation
from lorakin.family.members import *  # noqa: F403 - the list of names is there alone
from lorakin.family.members import FAMILY
from lorakin.family.members import __all__ as _members
from lorakin.family.method import Method, conflict
from lorakin.family.pair import Pair, Shape, Weight, all_finite, widened
from lorakin.family.registry import member_named, members, register
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.slots import Slot, Slots
from lorakin.family.words import method_named

__all__ = [
    "AXES",
    "FAMILY",
    "GRADIENTS",
    "INPUTS",
    "WEIGHT",
    "AdaptedModule",
    "Chain",
    "Change",
    "Collector",
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
    "Target",
    "Weight",
    "all_finite",
    "conflict",
    "member_named",
    "members",
    "method_named",
    "register",
    "widened",
]
__all__ += _members
