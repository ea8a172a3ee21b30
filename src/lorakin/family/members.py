"""The list of lorakin's own members, in order of complexity. A new one is a file beside this and its name here, twice."""

from lorakin.family.adalora import AdaLoRA
from lorakin.family.delta_lora import DeltaLoRA
from lorakin.family.dora import DoRA
from lorakin.family.lora import LoRA
from lorakin.family.lora_drop import LoRADrop
from lorakin.family.lora_fa import LoRAFA
from lorakin.family.lora_plus import LoRAPlus
from lorakin.family.member import Member
from lorakin.family.registry import register
from lorakin.family.vera import VeRA

FAMILY: tuple[type[Member], ...] = (
    LoRA,
    LoRAPlus,
    LoRAFA,
    VeRA,
    DoRA,
    AdaLoRA,
    LoRADrop,
    DeltaLoRA,
)
for _member in FAMILY:
    register(_member)

__all__ = ["AdaLoRA", "DeltaLoRA", "DoRA", "LoRA", "LoRADrop", "LoRAFA", "LoRAPlus", "VeRA"]
