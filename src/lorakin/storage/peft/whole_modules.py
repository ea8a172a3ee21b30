"""Modules that are trained whole (`modules_to_save`), and the base's own biases beside its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError


def from_peft(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], rest: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Returns the states of the modules that are trained whole, by path, and the other tensors."""
    names = config.get("modules_to_save") or []
    ends = tuple(names)
    states: dict[str, dict[str, Tensor]] = {}
    for path in modules:
        is_named = any(path == name or path.endswith("." + name) for name in names)
        # PEFT takes every module whose path ends in the name: "norm" for "input_layernorm" too.
        is_taken = bool(ends) and path.endswith(ends)
        if is_named or (is_taken and any(key.startswith(path + ".") for key in rest)):
            states[path] = {}
    left = {}
    for key, tensor in rest.items():
        owner = next((path for path in states if key.startswith(path + ".")), None)
        if owner is None:
            left[key] = tensor
        else:
            states[owner][key.removeprefix(owner + ".")] = tensor
    # A module without parameters, such as a dropout, needs no state.
    states = {
        path: state
        for path, state in states.items()
        if state or any(True for _ in modules[path].parameters())
    }
    return states, left


def without_head_biases(
    modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Returns the tensors `rest` without the biases of heads that PEFT adds to a file.

    Raises:
        AdapterError: such a bias is not the one that this model has.
    """
    left = {}
    for key, tensor in rest.items():
        owner, _, name = key.rpartition(".")
        path = owner.removesuffix(".base_layer")
        module = modules.get(path)
        is_bias = isinstance(module, nn.Linear) and name == "bias"
        base = module._parameters.get("bias") if module is not None and is_bias else None
        if base is None or f"{owner}.weight" not in rest:
            left[key] = tensor
        elif not _is_close(tensor, base.detach()):
            raise AdapterError(
                f"{where}: it is for another base model, in which {path} has another bias. Load "
                "that bias into the base before the adapter"
            )
    return left


def _is_close(saved: Tensor, base: Tensor) -> bool:
    """Returns whether two biases are equal up to rounding; True for one on the meta device."""
    if base.is_meta:
        return True
    if saved.shape != base.shape:
        return False
    return torch.allclose(saved.float(), base.cpu().float(), rtol=1e-2, atol=1e-3)
