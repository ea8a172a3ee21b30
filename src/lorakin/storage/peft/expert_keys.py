"""The keys of expert stacks in PEFT's files, and the tensors of one module.

PEFT wraps a module once for each of its parameters that it adapts. Every wrapper adds one
`base_layer.` to the keys of what lies inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.inject.adapted import module_at
from lorakin.inject.experts import matrix_count
from lorakin.storage.peft.forms import NAMES, PREFIX

NESTED = "base_layer."


def wrapped(key: str, depths: Mapping[str, int]) -> str:
    """The key in PEFT's model of a tensor that may lie inside one of these owners.

    >>> wrapped("base_model.model.mlp.experts.router.bias", {"mlp.experts": 2})
    'base_model.model.mlp.experts.base_layer.base_layer.router.bias'

    `depths`: path of a module that owns stacks → how many of them are adapted.
    """
    if not key.startswith(PREFIX):
        return key
    path = inner = key.removeprefix(PREFIX)
    for owner, depth in sorted(depths.items(), key=lambda item: -len(item[0])):
        own = path.removeprefix(f"{owner}.").replace(NESTED, "") in NAMES.values()
        if path.startswith(f"{owner}.") and not own:
            inner = f"{owner}.{NESTED * depth}{inner[len(owner) + 1 :]}"
    return PREFIX + inner


def unwrapped(key: str, depths: Mapping[str, int]) -> str:
    """The inverse of `wrapped`."""
    if not key.startswith(PREFIX):
        return key
    path = key.removeprefix(PREFIX)
    for owner, depth in sorted(depths.items(), key=lambda item: len(item[0])):
        start = f"{owner}.{NESTED * depth}"
        path = f"{owner}.{path.removeprefix(start)}" if path.startswith(start) else path
    return PREFIX + path


def take(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """Remove the tensors of one module from `tensors` and return them by slot."""
    found = {slot: start + name for slot, name in NAMES.items() if start + name in tensors}
    return {slot: tensors.pop(key) for slot, key in found.items()}


def keyed(start: str, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module under their keys, which begin with `start`."""
    return {start + NAMES[slot]: tensor for slot, tensor in slots.items()}


def turned(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the transposed change, (B·A)ᵀ = Aᵀ·Bᵀ."""
    if not {"A", "B"} <= slots.keys():
        return dict(slots)
    return {**slots, "A": slots["B"].T, "B": slots["A"].T}


def experts_in(model: nn.Module, stack: str) -> int:
    """How many matrices the parameter at the path `stack` holds."""
    owner, _, name = stack.rpartition(".")
    parameters: Mapping[str, Any] = module_at(model, owner)._parameters
    return matrix_count(parameters[name])
