"""The keys of expert stacks in PEFT's files, and of the tensors of one module.

PEFT wraps a module once for each of its parameters that it adapts. Every wrapper adds one
`base_layer.` to the keys of what lies inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.inject.adapted import module_at
from lorakin.inject.experts import matrix_count
from lorakin.storage.peft.formats import DOWN, LORA_TENSOR_NAMES, PREFIX, UP

BASE_LAYER_PREFIX = "base_layer."


def wrapped(key: str, depths: Mapping[str, int]) -> str:
    """Returns the key in PEFT's model of a tensor that may lie inside one of these owners.

    >>> wrapped("base_model.model.mlp.experts.router.bias", {"mlp.experts": 2})
    'base_model.model.mlp.experts.base_layer.base_layer.router.bias'

    `depths`: path of a module that owns stacks → how many of them are adapted.
    """
    if not key.startswith(PREFIX):
        return key
    path = inner = key.removeprefix(PREFIX)
    for owner, depth in sorted(depths.items(), key=lambda item: -len(item[0])):
        name = path.removeprefix(f"{owner}.").replace(BASE_LAYER_PREFIX, "")
        is_of_owner = name in LORA_TENSOR_NAMES.values()
        if path.startswith(f"{owner}.") and not is_of_owner:
            inner = f"{owner}.{BASE_LAYER_PREFIX * depth}{inner[len(owner) + 1 :]}"
    return PREFIX + inner


def unwrapped(key: str, depths: Mapping[str, int]) -> str:
    """Inverts `wrapped`."""
    if not key.startswith(PREFIX):
        return key
    path = key.removeprefix(PREFIX)
    for owner, depth in sorted(depths.items(), key=lambda item: len(item[0])):
        start = f"{owner}.{BASE_LAYER_PREFIX * depth}"
        path = f"{owner}.{path.removeprefix(start)}" if path.startswith(start) else path
    return PREFIX + path


def take(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """Removes the tensors of one module from `tensors` and returns them by slot."""
    return {
        slot: tensors.pop(start + name)
        for slot, name in LORA_TENSOR_NAMES.items()
        if start + name in tensors
    }


def keyed(start: str, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of one module under their keys, which begin with `start`."""
    return {start + LORA_TENSOR_NAMES[slot]: tensor for slot, tensor in slots.items()}


def transposed(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the transposed change, (B·A)ᵀ = Aᵀ·Bᵀ."""
    if not {DOWN, UP} <= slots.keys():
        return dict(slots)
    return {**slots, DOWN: slots[UP].T, UP: slots[DOWN].T}


def experts_in(model: nn.Module, stack: str) -> int:
    """Returns how many matrices the parameter at the path `stack` holds."""
    owner, _, name = stack.rpartition(".")
    parameters: Mapping[str, Any] = module_at(model, owner)._parameters
    return matrix_count(parameters[name])
