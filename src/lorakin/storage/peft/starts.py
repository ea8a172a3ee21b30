"""What PEFT may begin training from, or do while it trains, and whether its files are a plain pair afterwards.

| start (`init_lora_weights`) | the base weight | what is in the file |
|---|---|---|
| true, false, null, gaussian, orthogonal, eva, mica | as it was | the plain pair |
| pissa, pissa_niter_N, olora, corda, lora_ga | less s·B₀·A₀ of the start | a pair for that base; PEFT makes it anew at load |
| loftq | another, quantised one | a pair for that base |

VeLoRA (how gradients are kept) and MonteCLoRA (noise on A) act while training alone; their own tensors say nothing of the
finished adapter. A `…_config` whose start is not chosen is ignored, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

PLAIN = ("gaussian", "orthogonal", "eva", "mica", "lora_fa")
TAKEN_OUT = ("pissa", "olora", "corda", "lora_ga")
CONFIGS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")
"""What a start is made with."""
TRAINING = {"velora_config": "lora_velora_embed", "monteclora_config": "lora_monteclora_sampler"}
"""What acts while training alone → the name of its tensors in the file."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why the file is no plain pair on the plain base, to follow "it"; None if it is one."""
    start = config.get("init_lora_weights", True)
    name = start.lower() if isinstance(start, str) else start
    if name is None or isinstance(name, bool) or name in PLAIN:
        return None
    if isinstance(name, str) and name.startswith(TAKEN_OUT):
        return (
            f"was initialised with {start!r}, which changes the base weight: what the pair began with was taken out of it. "
            "This version does not repeat that; convert it with PEFT (path_initial_model_for_weight_conversion) first"
        )
    if name == "loftq":
        return (
            f"was initialised with {start!r}, which changes the base weight for a quantised one that LoftQ made; merge it with "
            "PEFT on that base"
        )
    return f"was initialised with {start!r}, of which this version does not know whether it changes the base weight"


def without_training(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors but for those of what acts while training alone, also where a config was written anew without it."""
    names = set(TRAINING.values())
    return {key: tensor for key, tensor in tensors.items() if names.isdisjoint(key.split("."))}
