"""PEFT's form for torch's attention (nn.MultiheadAttention), both ways.

lorakin has a pair for the parameter, at `<path>.in_proj_weight.0`, and one for the layer
`<path>.out_proj`. PEFT has one adapter for both, with one rank and scale:

    <path>.lora_A.weight                      (r, inputs)
    <path>.lora_B.weight                      (3·outputs, r)
    <path>.base_layer.out_proj.lora_A.weight  (r, outputs)
    <path>.base_layer.out_proj.lora_B.weight  (outputs, r)

PEFT 0.21.2 adds out_proj's change twice in every forward (peft#3774). The tensors mean it once,
here and in the file.
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
from lorakin.storage.peft.forms import NAMES, PREFIX, TARGET_PARAMETERS
from lorakin.storage.peft.scales import PATTERNS, PairScale, scale_at, set_scale, without

IN, OUT = "in_proj_weight.0", "out_proj"
NESTED = {IN: "", OUT: "base_layer.out_proj."}
"""Part of an attention → what stands before the names of its tensors."""


def _owners(model: nn.Module, paths: Collection[str]) -> list[str]:
    """The attentions whose in-projection is among the adapted `paths`."""
    owners = [path.removesuffix(f".{IN}") for path in paths if path.endswith(f".{IN}")]
    return [owner for owner in owners if is_attention(module_at(model, owner))]


def are_whole(model: nn.Module, methods: Mapping[str, Method]) -> bool:
    """Whether each attention has both of its parts adapted alike, as PEFT's form needs it."""
    return all(
        methods.get(f"{owner}.{OUT}") == methods[f"{owner}.{IN}"]
        for owner in _owners(model, methods)
    )


def joined(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PairScale],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, PairScale]]:
    """The config and tensors with attentions as PEFT has them, and the scales of all other pairs.

    `scales`: path → rank and alpha of each pair.
    """
    owners = _owners(model, scales)
    if not owners:
        return dict(config), dict(tensors), dict(scales)
    paths = {f"{owner}.{part}" for owner in owners for part in NESTED}
    config, left, done = without(config, paths), dict(tensors), dict[str, Tensor]()
    for owner in owners:
        there = {part: take(left, f"{PREFIX}{owner}.{part}.") for part in NESTED}
        own = {part: scales[f"{owner}.{part}"] for part in NESTED if f"{owner}.{part}" in scales}
        scale = max(own.values(), key=lambda one: one.rank)
        for part, slots in there.items():
            if part in own:
                slots = _widened(slots, own[part], scale)
            else:
                slots = _nothing(there[IN], base_weight_of(module_at(model, f"{owner}.{part}")))
            done |= keyed(f"{PREFIX}{owner}.{NESTED[part]}", slots)
        set_scale(config, owner, scale)
    config["target_modules"] = sorted([*config["target_modules"], *owners])
    others = {path: scale for path, scale in scales.items() if path not in paths}
    return config, left | done, others


def _nothing(like: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """A pair that changes nothing of `weight`, with the slots and the rank of `like`."""
    rank, m = len(like["A"]), like.get("m")
    A, B = like["A"].new_zeros(rank, weight.shape[1]), like["A"].new_zeros(len(weight), rank)
    return {"A": A, "B": B} if m is None else {"A": A, "B": B, "m": row_norms(weight, B, A).to(m)}


def _widened(slots: Mapping[str, Tensor], own: PairScale, scale: PairScale) -> dict[str, Tensor]:
    """The same change with the rank and scale `scale`: zeros fill up, B takes what is left of s."""
    factor, more = own.value / scale.value, scale.rank - len(slots["A"])
    if factor == 1 and not more:
        return dict(slots)
    A, B = slots["A"], slots["B"] * factor
    return {
        **slots,
        "A": torch.cat([A, A.new_zeros(more, A.shape[1])]),
        "B": torch.cat([B, B.new_zeros(len(B), more)], 1),
    }


def apart(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    known: Collection[str] | None,
    where: str,
    *,
    ours: bool,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The config and tensors with a pair for each part of an attention again.

    Args:
        config: PEFT's config.
        tensors: tensors by PEFT's key.
        known: the paths for which lorakin.json has tensors, if it has any. A part beside them
            whose pair is zero is not adapted.
        where: the file, for messages.
        ours: lorakin wrote the files.
    """
    owners = _owners_in_file(config, tensors)
    if not owners:
        return config, tensors
    left, done, doubled = dict(tensors), dict[str, Tensor](), list[str]()
    patterns = {field: dict(config.get(field) or {}) for field, _ in PATTERNS}
    outs = []
    for owner in owners:
        scale = scale_at(config, owner)
        for part, nested in NESTED.items():
            path, slots = f"{owner}.{part}", take(left, f"{PREFIX}{owner}.{nested}")
            moves = "B" in slots and bool(slots["B"].any())
            doubled += [path] if part == OUT and moves else []
            if known is not None and path not in known and not moves:
                continue
            done |= keyed(f"{PREFIX}{path}.", slots)
            outs += [path] if part == OUT else []
            for (field, usual), value in zip(PATTERNS, (scale.rank, scale.alpha), strict=True):
                if resolve(patterns[field], path, config.get(usual, 8)) != value:
                    patterns[field] = {f"^{re.escape(path)}": value} | patterns[field]
    if doubled and not ours:
        warnings.warn(
            f"{where}: it adapts {some(doubled)}. PEFT 0.21.2 adds that change twice in every "
            "forward (peft#3774); lorakin adds it once, as the tensors say, so the outputs differ "
            "from PEFT's",
            LorakinWarning,
            stacklevel=2,
        )
    targets = _with(config.get("target_modules"), outs)
    return {**config, **patterns, "target_modules": targets}, left | done


def _owners_in_file(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """The attentions that a file adapts, by the keys of their out-projections."""
    end = f".{NESTED[OUT]}{NAMES['A']}"
    owners = [key.removeprefix(PREFIX).removesuffix(end) for key in tensors if key.endswith(end)]
    # If the config names a parameter of the module, "base_layer." stands for that wrapper.
    named = tuple(f".{target}" for target in config.get(TARGET_PARAMETERS) or ())
    return [
        owner
        for owner in owners
        if not owner.endswith(".base_layer")
        and not any(f".{owner}.{name}".endswith(named) for name in IN_PROJECTIONS)
    ]


def _with(targets: Any, outs: list[str]) -> Any:
    """The config's targets, and these paths."""
    if isinstance(targets, str) and targets != "all-linear":
        return "|".join([f"(?:{targets})", *map(re.escape, outs)])
    if targets is not None and not isinstance(targets, str):
        return [*targets, *outs]
    return targets
