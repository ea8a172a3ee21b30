"""torch's attention (`nn.MultiheadAttention`) in PEFT's files: reading and writing.

lorakin has a pair for the parameter, at `<path>.in_proj_weight.0`, and one for the layer
`<path>.out_proj`. PEFT has one adapter for both, with one rank and scale:

    <path>.lora_A.weight                      (r, inputs)
    <path>.lora_B.weight                      (3·outputs, r)
    <path>.base_layer.out_proj.lora_A.weight  (r, outputs)
    <path>.base_layer.out_proj.lora_B.weight  (outputs, r)

PEFT 0.21.2 adds out_proj's change twice in every forward (peft#3774). lorakin adds it once, as the
tensors say.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import LorakinWarning, some
from lorakin.family import Method
from lorakin.family.dora import row_norms
from lorakin.inject.adapted import module_at
from lorakin.inject.parameters import IN_PROJECTIONS, is_attention
from lorakin.inject.patterns import resolve
from lorakin.inject.placement import base_weight_of
from lorakin.storage.peft.expert_keys import keyed, take
from lorakin.storage.peft.formats import (
    DOWN,
    LORA_TENSOR_NAMES,
    MAGNITUDE,
    PREFIX,
    TARGET_PARAMETERS,
    UP,
)
from lorakin.storage.peft.scales import PATTERNS, PairScale, scale_at, set_scale, without_modules

IN, OUT = "in_proj_weight.0", "out_proj"
PART_PREFIX = {IN: "", OUT: "base_layer.out_proj."}
"""Part of an attention → the prefix of its tensors' names in the file."""


def _owners(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Returns the attentions whose in-projection is among the adapted `paths`."""
    owners = [path.removesuffix(f".{IN}") for path in paths if path.endswith(f".{IN}")]
    return [owner for owner in owners if is_attention(module_at(model, owner))]


def are_whole(model: nn.Module, methods: Mapping[str, Method]) -> bool:
    """Returns whether each attention has both parts adapted alike, which PEFT's format needs."""
    return all(
        methods.get(f"{owner}.{OUT}") == methods[f"{owner}.{IN}"]
        for owner in _owners(model, methods)
    )


def to_peft(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PairScale],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, PairScale]]:
    """Returns the config and tensors with attentions as PEFT has them, and the other pairs' scales.

    `scales`: path → rank and alpha of each pair.
    """
    owners = _owners(model, scales)
    if not owners:
        return dict(config), dict(tensors), dict(scales)
    paths = {f"{owner}.{part}" for owner in owners for part in PART_PREFIX}
    config, left, written = without_modules(config, paths), dict(tensors), dict[str, Tensor]()
    for owner in owners:
        slots_of = {part: take(left, f"{PREFIX}{owner}.{part}.") for part in PART_PREFIX}
        scale_of = {
            part: scales[f"{owner}.{part}"] for part in PART_PREFIX if f"{owner}.{part}" in scales
        }
        scale = max(scale_of.values(), key=lambda pair_scale: pair_scale.rank)
        for part, slots in slots_of.items():
            if part in scale_of:
                slots = _padded_to(scale, slots, scale_of[part])
            else:
                weight = base_weight_of(module_at(model, f"{owner}.{part}"))
                slots = _zero_pair(slots_of[IN], weight)
            written |= keyed(f"{PREFIX}{owner}.{PART_PREFIX[part]}", slots)
        set_scale(config, owner, scale)
    config["target_modules"] = sorted([*config["target_modules"], *owners])
    others = {path: scale for path, scale in scales.items() if path not in paths}
    return config, left | written, others


def _zero_pair(like: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Returns a pair that does not change `weight`, with the slots and the rank of `like`."""
    rank, m = len(like[DOWN]), like.get(MAGNITUDE)
    A, B = like[DOWN].new_zeros(rank, weight.shape[1]), like[DOWN].new_zeros(len(weight), rank)
    slots = {DOWN: A, UP: B}
    return slots if m is None else slots | {MAGNITUDE: row_norms(weight, B, A).to(m)}


def _padded_to(
    scale: PairScale, slots: Mapping[str, Tensor], present: PairScale
) -> dict[str, Tensor]:
    """Returns the same change at another rank and scale: with zeros, and B times a factor."""
    factor, added = present.value / scale.value, scale.rank - len(slots[DOWN])
    if factor == 1 and not added:
        return dict(slots)
    A, B = slots[DOWN], slots[UP] * factor
    return {
        **slots,
        DOWN: torch.cat([A, A.new_zeros(added, A.shape[1])]),
        UP: torch.cat([B, B.new_zeros(len(B), added)], 1),
    }


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    recorded: Collection[str] | None,
    where: str,
    *,
    by_lorakin: bool,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Returns the config and tensors with a pair for each part of an attention.

    Args:
        config: PEFT's config.
        tensors: tensors by PEFT's key.
        recorded: the paths for which lorakin.json has tensors, if it has any. A part that is not
            among them and whose pair is zero is not adapted.
        where: the file, for messages.
        by_lorakin: whether lorakin wrote the files.
    """
    owners = _owners_in_file(config, tensors)
    if not owners:
        return config, tensors
    left, split, doubled = dict(tensors), dict[str, Tensor](), list[str]()
    patterns = {field: dict(config.get(field) or {}) for field, _ in PATTERNS}
    out_projections = []
    for owner in owners:
        scale = scale_at(config, owner)
        for part, nested in PART_PREFIX.items():
            path, slots = f"{owner}.{part}", take(left, f"{PREFIX}{owner}.{nested}")
            is_zero = UP not in slots or not slots[UP].any()
            doubled += [path] if part == OUT and not is_zero else []
            if recorded is not None and path not in recorded and is_zero:
                continue
            split |= keyed(f"{PREFIX}{path}.", slots)
            out_projections += [path] if part == OUT else []
            for (field, default), value in zip(PATTERNS, (scale.rank, scale.alpha), strict=True):
                if resolve(patterns[field], path, config.get(default, 8)) != value:
                    patterns[field] = {f"^{re.escape(path)}": value} | patterns[field]
    if doubled and not by_lorakin:
        warnings.warn(
            f"{where}: it adapts {some(doubled)}. PEFT 0.21.2 adds that change twice in every "
            "forward (peft#3774); lorakin adds it once, as the tensors say, so the outputs differ "
            "from PEFT's",
            LorakinWarning,
            stacklevel=2,
        )
    targets = _with_paths(config.get("target_modules"), out_projections)
    return {**config, **patterns, "target_modules": targets}, left | split


def _owners_in_file(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the attentions that a file adapts, by the keys of their out-projections."""
    end = f".{PART_PREFIX[OUT]}{LORA_TENSOR_NAMES[DOWN]}"
    owners = [key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    # If the config names a parameter of the module, its "base_layer." is that parameter's wrapper.
    named = tuple(f".{target}" for target in config.get(TARGET_PARAMETERS) or ())
    return [
        owner
        for owner in owners
        if not owner.endswith(".base_layer")
        and not any(f".{owner}.{name}".endswith(named) for name in IN_PROJECTIONS)
    ]


def _with_paths(targets: Any, paths: list[str]) -> Any:
    """Returns the config's targets and these paths."""
    if isinstance(targets, str) and targets != "all-linear":
        return "|".join([f"(?:{targets})", *map(re.escape, paths)])
    if targets is not None and not isinstance(targets, str):
        return [*targets, *paths]
    return targets
