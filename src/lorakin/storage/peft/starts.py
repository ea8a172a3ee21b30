"""What PEFT may start training from, or do while it trains, and what its files mean afterwards.

| start (`init_lora_weights`) | the base weight | the file holds |
|---|---|---|
| true, false, null, gaussian, orthogonal, eva, mica, lora_fa | as it was | the plain pair |
| pissa, olora | less s·B₀·A₀, the start | a pair for that base; PEFT makes the start again |
| pissa_niter_N | the same, of a random draw | the same, but PEFT draws another start at load |
| corda | less s·B₀·A₀, made of data | a pair for that base; PEFT needs the data again |
| lora_ga | the same | the same, but PEFT loads it as a plain pair on the plain base |
| loftq | another, quantised one | a pair for that base |

PiSSA and OLoRA are read as the members of that name, which make B₀ and A₀ again of the base weight.

VeLoRA (how gradients are kept) and MonteCLoRA (noise on A) act only while training; their own
tensors say nothing of the finished adapter. A `…_config` whose start is not chosen is ignored, as
in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakin.storage.peft.forms import PLAIN_STARTS, made_again, start_word

LOST = "lora_ga"
"""The word whose file PEFT itself reads as a plain pair, although training changed the base."""
CONFIGS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")
"""Settings of a start."""
TRAINING = {"velora_config": "lora_velora_embed", "monteclora_config": "lora_monteclora_sampler"}
"""Field of what acts only while training → the name of its tensors in the file."""
CONVERT = "convert it with PEFT (path_initial_model_for_weight_conversion) first"


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why the pair in the file cannot be understood, to follow "it"; None if it can.

    >>> refusal({"init_lora_weights": "loftq"})[:32]
    "was initialised with 'loftq', wh"
    """
    start, word = config.get("init_lora_weights", True), start_word(config)
    if start is None or isinstance(start, bool) or word in (*PLAIN_STARTS, LOST, *made_again()):
        return None
    if word.startswith("pissa_niter"):
        return (
            f"was initialised with {start!r}: PEFT took a random start out of the base weight, and "
            "no file keeps it, so that PEFT itself loads another adapter. Where it was trained, "
            f"{CONVERT}"
        )
    if word == "corda":
        return (
            f"was initialised with {start!r}, which changes the base weight: a start made of data "
            f"was taken out of it. This version does not repeat that; {CONVERT}"
        )
    if word == "loftq":
        return (
            f"was initialised with {start!r}, which changes the base weight for a quantised one "
            "that LoftQ made; merge it with PEFT on that base"
        )
    return (
        f"was initialised with {start!r}, and this version does not know whether that changes the "
        "base weight"
    )


def warning(config: Mapping[str, Any]) -> str | None:
    """What is to be said of a file that is read as PEFT reads it, and is not what was trained."""
    if start_word(config) != LOST:
        return None
    return (
        f"it was initialised with {LOST!r}: training took a start out of the base weight, which "
        "the file does not keep. It is read as PEFT reads it, as a plain pair on the plain base, "
        f"which is not the model that was trained. For that, where it was trained, {CONVERT}"
    )


def without_training(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without those of what acts only while training.

    They may be there although the config no longer says so, if it was written again.
    """
    names = set(TRAINING.values())
    return {key: tensor for key, tensor in tensors.items() if names.isdisjoint(key.split("."))}
