"""PEFT's initialisations (`init_lora_weights`), and what a file means after training with each.

| start (`init_lora_weights`) | the base weight | the file holds |
|---|---|---|
| true, false, null, gaussian, orthogonal, eva, mica, lora_fa | as it was | the plain pair |
| pissa, olora | minus s·B₀·A₀, the start | a pair for that base; PEFT computes the start again |
| pissa_niter_N | minus a random start | a pair for that base; PEFT draws another start |
| corda | minus s·B₀·A₀, computed from data | a pair for that base; PEFT needs the data again |
| lora_ga | minus s·B₀·A₀, computed from gradients | that pair; PEFT adds it to the plain base |
| loftq | another, quantised one | a pair for that base |

PiSSA and OLoRA are read as the members of that name, which compute B₀ and A₀ from the base weight.

VeLoRA (how gradients are kept) and MonteCLoRA (noise on A) act only while training; their own
tensors are not part of the finished adapter. A `…_config` whose start is not chosen is ignored, as
in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakin.storage.peft.formats import PLAIN_STARTS, start_word, starts_repeated_at_load

START_NOT_KEPT = "lora_ga"
"""The start whose files PEFT reads as a plain pair, although training changed the base."""
CONFIGS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")
"""Fields with the settings of a start."""
TRAINING_ONLY = {
    "velora_config": "lora_velora_embed",
    "monteclora_config": "lora_monteclora_sampler",
}
"""Field of what acts only while training → the name of its tensors in the file."""
CONVERT = "convert it with PEFT (path_initial_model_for_weight_conversion) first"


def refusal(config: Mapping[str, Any]) -> str | None:
    """Returns why the pair in the file cannot be used, to follow "it"; None if it can.

    >>> refusal({"init_lora_weights": "loftq"})[:32]
    "was initialised with 'loftq', wh"
    """
    start, word = config.get("init_lora_weights", True), start_word(config)
    if (
        start is None
        or isinstance(start, bool)
        or word in (*PLAIN_STARTS, START_NOT_KEPT, *starts_repeated_at_load())
    ):
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
    """Returns the warning for a file from which PEFT loads another model than was trained."""
    if start_word(config) != START_NOT_KEPT:
        return None
    return (
        f"it was initialised with {START_NOT_KEPT!r}: training subtracted a start from the base "
        "weight, which the file does not keep. It is read as PEFT reads it, as a plain pair on the "
        "plain base, which is not the model that was trained. For that, where it was trained, "
        f"{CONVERT}"
    )


def without_training_tensors(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the tensors without those of what acts only while training.

    The file may have them although a config that was written again does not say so.
    """
    names = set(TRAINING_ONLY.values())
    return {key: tensor for key, tensor in tensors.items() if names.isdisjoint(key.split("."))}
