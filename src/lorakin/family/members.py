"""The list of lorakin's own members, in order of complexity. A new one is a file and its name here.

Everything else (`lorakin.NAME`, the command, files, plans, comparisons) follows from this list.
"""

from lorakin.family.adalora import AdaLoRA
from lorakin.family.delta_lora import DeltaLoRA
from lorakin.family.dora import DoRA
from lorakin.family.eva import EVA
from lorakin.family.lora import LoRA
from lorakin.family.lora_drop import LoRADrop
from lorakin.family.lora_fa import LoRAFA
from lorakin.family.lora_ga import LoRAGA
from lorakin.family.lora_plus import LoRAPlus
from lorakin.family.lora_xs import LoRAXS
from lorakin.family.member import Member
from lorakin.family.olora import OLoRA
from lorakin.family.pissa import PiSSA
from lorakin.family.registry import register
from lorakin.family.vera import VeRA

FAMILY: tuple[type[Member], ...] = (
    *(LoRA, LoRAPlus, LoRAFA, VeRA, DoRA, AdaLoRA, LoRADrop, DeltaLoRA),
    *(PiSSA, OLoRA, LoRAXS, EVA, LoRAGA),
)
"""The eight methods, then the five starts."""

for _member in FAMILY:
    register(_member)

__all__ = [
    "EVA",
    "AdaLoRA",
    "DeltaLoRA",
    "DoRA",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "LoRAGA",
    "LoRAPlus",
    "LoRAXS",
    "OLoRA",
    "PiSSA",
    "VeRA",
]
