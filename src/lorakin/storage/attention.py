"""PEFT's form for torch's attention (nn.MultiheadAttention), both ways.

lorakin has a pair for the parameter, at `<path>.in_proj_weight.0`, and one for the layer
`<path>.out_proj`. PEFT has one adapter for both, with one rank and scale:

    <path>.lora_A.weight (r, inputs)                       <path>.lora_B.weight (3·outputs, r)
    <path>.base_layer.out_proj.lora_A.weight (r, outputs)  <path>.base_layer.out_proj.lora_B.weight (outputs, r)

PEFT 0.21.2 adds out_proj's change twice in every forward (peft#3774). The tensors mean it once, here and in the file.
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
from lorakin.inject.placement import own_weight
from lorakin.storage.expert_layout import NAMES
from lorakin.storage.expert_stacks import FIELD, PairScale, _set_scale, _taken, _without, scale_at

IN, OUT = "in_proj_weight.0", "out_proj"
NESTED = {IN: "", OUT: "base_layer.out_proj."}


def _owners(model: nn.Module, paths: Collection[str]) -> list[str]:
    """The attentions whose in-projection is among the adapted `paths`."""
    owners = [path.removesuffix(f".{IN}") for path in paths if path.endswith(f".{IN}")]
    return [owner for owner in owners if is_attention(module_at(model, owner))]


def are_whole(model: nn.Module, sites: Mapping[str, Method]) -> bool:
    """Whether every attention has both of its parts adapted alike, so that PEFT's form holds just that."""
    return all(
        sites.get(f"{owner}.{OUT}") == sites[f"{owner}.{IN}"] for owner in _owners(model, sites)
    )


def written(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PairScale],
    prefix: str,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, PairScale]]:
    """The files with attentions as PEFT has them, and the scales of all other pairs, by path."""
    owners = _owners(model, scales)
    if not owners:
        return dict(config), dict(tensors), dict(scales)
    paths = {f"{owner}.{part}" for owner in owners for part in NESTED}
    config, left, done = _without(config, paths), dict(tensors), dict[str, Tensor]()
    for owner in owners:
        there = {part: _taken(left, f"{prefix}{owner}.{part}.") for part in NESTED}
        own = {part: scales[f"{owner}.{part}"] for part in NESTED if f"{owner}.{part}" in scales}
        scale = max(own.values(), key=lambda one: one.rank)
        for part, slots in there.items():
            if part in own:
                done |= _named(f"{prefix}{owner}.{NESTED[part]}", _widened(slots, own[part], scale))
            else:
                weight = own_weight(module_at(model, f"{owner}.{part}"))
                done |= _named(f"{prefix}{owner}.{NESTED[part]}", _nothing(there[IN], weight))
        _set_scale(config, owner, scale)
    config["target_modules"] = sorted([*config["target_modules"], *owners])
    return config, left | done, {path: scale for path, scale in scales.items() if path not in paths}


def _named(start: str, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {start + NAMES[slot]: tensor for slot, tensor in slots.items()}


def _nothing(like: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """A pair that changes nothing of `weight`, with as many ranks, and a magnitude, as those of `like`."""
    rank, m = len(like["A"]), like.get("m")
    A, B = like["A"].new_zeros(rank, weight.shape[1]), like["A"].new_zeros(len(weight), rank)
    return {"A": A, "B": B} if m is None else {"A": A, "B": B, "m": row_norms(weight, B, A).to(m)}


def _widened(slots: Mapping[str, Tensor], own: PairScale, scale: PairScale) -> dict[str, Tensor]:
    """A pair of one rank and scale as one of another: zeros beside it, and the rest of the scale in B."""
    factor, more = own.value / scale.value, scale.rank - len(slots["A"])
    if factor == 1 and not more:
        return dict(slots)
    A, B = slots["A"], slots["B"] * factor
    return {
        **slots,
        "A": torch.cat([A, A.new_zeros(more, A.shape[1])]),
        "B": torch.cat([B, B.new_zeros(len(B), more)], 1),
    }


def read(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    known: Collection[str] | None,
    is_ours: bool,
    where: str,
    prefix: str,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The files with a pair for each part of an attention again.

    `known` are the paths for which lorakin.json has tensors, if it has any: a part beside them whose pair is zero is none.
    """
    end = f".{NESTED[OUT]}{NAMES['A']}"
    owners = [key.removeprefix(prefix).removesuffix(end) for key in tensors if key.endswith(end)]
    named = tuple(
        f".{target}" for target in config.get(FIELD) or ()
    )  # there "base_layer." is of what wraps a parameter
    owners = [
        one
        for one in owners
        if not any(f".{one}.{name}".endswith(named) for name in IN_PROJECTIONS)
    ]
    owners = [one for one in owners if not one.endswith(".base_layer")]
    if not owners:
        return config, tensors
    left, apart, doubled = dict(tensors), dict[str, Tensor](), list[str]()
    patterns: dict[str, dict[str, Any]] = {
        field: dict(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")
    }
    outs = []
    for owner in owners:
        scale = scale_at(config, owner)
        for part, nested in NESTED.items():
            path, slots = f"{owner}.{part}", _taken(left, f"{prefix}{owner}.{nested}")
            moves = "B" in slots and bool(slots["B"].any())
            doubled += [path] if part == OUT and moves else []
            if known is not None and path not in known and not moves:
                continue
            apart |= _named(f"{prefix}{path}.", slots)
            outs += [path] if part == OUT else []
            for field, default, value in (
                ("rank_pattern", "r", scale.rank),
                ("alpha_pattern", "lora_alpha", scale.alpha),
            ):
                if resolve(patterns[field], path, config.get(default, 8)) != value:
                    patterns[field] = {f"^{re.escape(path)}": value} | patterns[field]
    if doubled and not is_ours:
        warnings.warn(
            f"{where}: it adapts {some(doubled)}; PEFT 0.21.2 adds that change twice in every forward (peft#3774), lorakin "
            "once, as the tensors say, so the outputs differ from PEFT's",
            LorakinWarning,
            stacklevel=2,
        )
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        targets = "|".join([f"(?:{targets})", *map(re.escape, outs)])
    elif targets is not None and not isinstance(targets, str):
        targets = [*targets, *outs]
    return {**config, **patterns, "target_modules": targets}, left | apart
