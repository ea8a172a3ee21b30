"""Modules that are trained whole (`modules_to_save`), and the base's own biases beside its head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError


def split(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], rest: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The states of the modules that are trained whole, by path, and the tensors that are left."""
    names = config.get("modules_to_save") or []
    ends = tuple(names)
    copies: dict[str, dict[str, Tensor]] = {}
    for path in modules:
        is_named = any(path == name or path.endswith("." + name) for name in names)
        # PEFT takes every module whose path ends in the name: "norm" for "input_layernorm" too.
        is_taken = bool(ends) and path.endswith(ends)
        if is_named or (is_taken and any(key.startswith(path + ".") for key in rest)):
            copies[path] = {}
    left = {}
    for key, tensor in rest.items():
        owner = next((path for path in copies if key.startswith(path + ".")), None)
        if owner is None:
            left[key] = tensor
        else:
            copies[owner][key.removeprefix(owner + ".")] = tensor
    found = {
        path: state
        for path, state in copies.items()
        if state or any(True for _ in modules[path].parameters())
    }
    return found, left


def without_head_biases(
    modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors `rest` without the biases of heads that PEFT adds to a file.

    Raises:
        AdapterError: such a bias is not the one that this model has.
    """
    left = {}
    for key, tensor in rest.items():
        owner, _, name = key.rpartition(".")
        path = owner.removesuffix(".base_layer")
        module = modules.get(path)
        is_bias = isinstance(module, nn.Linear) and name == "bias"
        own = module._parameters.get("bias") if module is not None and is_bias else None
        if own is None or f"{owner}.weight" not in rest:
            left[key] = tensor
        elif not _is_same(tensor, own.detach()):
            raise AdapterError(
                f"{where}: it is for another base model: {path} had another bias there. Load that "
                "bias into the base before the adapter"
            )
    return left


def _is_same(there: Tensor, here: Tensor) -> bool:
    """Whether two biases are equal, as far as rounding lets one see."""
    if here.is_meta:
        return True
    here = here.cpu().float()
    if there.shape != here.shape:
        return False
    return torch.allclose(there.float(), here, rtol=1e-2, atol=1e-3)
