"""Do PEFT's files and lorakin's own part say the same function? Where both hold the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.family import Pair, UnadaptedModule, widened
from lorakin.family.low_rank import padded
from lorakin.inject import layer_kinds
from lorakin.inject.patterns import PatternValues
from lorakin.storage.document import Document, Slots
from lorakin.storage.peft.forms import LORA


def check_agreement(
    document: Document,
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, UnadaptedModule],
    config: Mapping[str, Any],
    theirs: Mapping[str, Slots],
    where: str,
) -> None:
    """Checks that the pairs of lorakin's own tensors are those that PEFT's files hold.

    Args:
        document: with lorakin's own tensors.
        modules: the model's modules by path.
        targets: path → shape and weight of the adapted modules.
        config: PEFT's config.
        theirs: path → slot → tensor in PEFT's file.
        where: the file, for messages.

    Raises:
        AdapterError: a pair is another one.
    """
    ranks, alphas = (
        PatternValues(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")
    )
    usual_rank = config.get("r", LORA.defaults["r"])
    usual_alpha = config.get("lora_alpha", LORA.defaults["lora_alpha"])
    for path, slots in document.slots.items():
        method = document.placement.methods[path]
        try:
            pair = method.low_rank(widened(slots), targets[path].shape)
        except (RuntimeError, IndexError, KeyError, TypeError):
            continue  # which `match` refuses, and says why
        own = theirs.get(path, {})
        if not own and not pair.down.shape[0]:
            continue
        rank = ranks.of(path, usual_rank) or 1
        alpha = alphas.of(path, usual_alpha) or 0
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        is_plain = {"A", "B"} <= own.keys() and abs(scale - 1) < 1e-6
        is_plain = is_plain and own["B"].flatten(1).shape[1] == rank
        if not is_plain or not _are_same(pair, own, modules[path]):
            raise AdapterError(
                f"{where}: for {path} adapter_config.json and adapter_model.safetensors say "
                "another change than lorakin.json; one of them was edited. Without lorakin.json "
                "the adapter is what PEFT's files say"
            )


def _are_same(pair: Pair, theirs: Slots, module: nn.Module) -> bool:
    """Whether A and B in PEFT's file, of scale 1, are this pair."""
    if layer_kinds.is_grouped(module):
        A, B = (theirs[slot].flatten(1).to(pair.up) for slot in ("A", "B"))
        return _close(pair.up @ pair.down, B @ A)
    # Experts of one stack, and the parts of an attention, all have the highest rank in the file.
    pair = padded(pair, max(len(theirs["A"]), pair.down.shape[0]))
    if not pair.down.shape[0]:
        return True
    return _close(pair.up, theirs["B"].flatten(1)) and _close(pair.down, theirs["A"].flatten(1))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    return torch.allclose(ours, theirs.to(ours), rtol=1e-3, atol=1e-6)
