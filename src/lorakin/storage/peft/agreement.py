"""Checks that PEFT's files and lorakin's part hold the same change, if both hold tensors."""

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
from lorakin.storage.peft.formats import DOWN, LORA, UP


def check_agreement(
    document: Document,
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, UnadaptedModule],
    config: Mapping[str, Any],
    in_peft: Mapping[str, Slots],
    where: str,
) -> None:
    """Checks that the pairs of lorakin's tensors are those that PEFT's files hold.

    Args:
        document: the document with the tensors of lorakin's part.
        modules: the model's modules by path.
        targets: path → shape and weight of the adapted modules.
        config: PEFT's config.
        in_peft: path → slot → tensor in PEFT's file.
        where: the file, for messages.

    Raises:
        AdapterError: a pair is a different one.
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
            continue  # `match` refuses it and says why
        peft = in_peft.get(path, {})
        if not peft and not pair.down.shape[0]:
            continue
        rank = ranks.of(path, usual_rank) or 1
        alpha = alphas.of(path, usual_alpha) or 0
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        is_plain = {DOWN, UP} <= peft.keys() and abs(scale - 1) < 1e-6
        is_plain = is_plain and peft[UP].flatten(1).shape[1] == rank
        if not is_plain or not _is_pair(pair, peft, modules[path]):
            raise AdapterError(
                f"{where}: for {path} adapter_config.json and adapter_model.safetensors hold "
                "another change than lorakin.json; one of them was edited. Without lorakin.json "
                "the adapter is read from PEFT's files alone"
            )


def _is_pair(pair: Pair, peft: Slots, module: nn.Module) -> bool:
    """Returns whether A and B in PEFT's file, of scale 1, are this pair."""
    if layer_kinds.is_grouped(module):
        A, B = (peft[slot].flatten(1).to(pair.up) for slot in (DOWN, UP))
        return _is_close(pair.up @ pair.down, B @ A)
    # Experts of one stack, and the parts of an attention, all have the highest rank in the file.
    pair = padded(pair, max(len(peft[DOWN]), pair.down.shape[0]))
    if not pair.down.shape[0]:
        return True
    return _is_close(pair.up, peft[UP].flatten(1)) and _is_close(pair.down, peft[DOWN].flatten(1))


def _is_close(ours: Tensor, peft: Tensor) -> bool:
    if ours.shape != peft.shape:
        return False
    return torch.allclose(ours, peft.to(ours), rtol=1e-3, atol=1e-6)
