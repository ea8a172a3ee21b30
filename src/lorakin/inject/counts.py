"""How many parameters a model and its adapters have, how many train, and where they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from lorakin.family.sharding import whole_shape
from lorakin.inject.attachments import Adapters, Attachments, attachments_or_none
from lorakin.inject.branch import Copy, slot_trains
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.model_registry import adapters_in
from lorakin.inject.quantised import is_quantised, shape_of
from lorakin.inject.token_rows import TokenRowsBranch

AllNoneOrSome = bool | Literal["irregular"]
"""True for all, False for none, "irregular" (PEFT's word) for some."""


def attachments_by(adapter: InsertedAdapter) -> list[Attachments]:
    """Returns the attachments of each of its modules; none for one that has been replaced."""
    return adapter.tensors.attachments() if adapter.is_present else []


def tensors_of(adapter: InsertedAdapter) -> list[nn.Parameter]:
    """Returns the adapter's tensors, once each; none once it is removed."""
    children = (attached[adapter.name] for attached in attachments_by(adapter))
    parameters = (parameter for child in children for parameter in child.parameters())
    return list({id(parameter): parameter for parameter in parameters}.values())


def requires_grad(adapter: InsertedAdapter) -> AllNoneOrSome:
    """Returns whether the tensors that its method trains require gradients.

    "irregular" if only some do, or if another tensor does.
    """
    flags: set[AllNoneOrSome] = set()
    for attached in attachments_by(adapter):
        child = attached[adapter.name]
        if isinstance(child, Copy | TokenRowsBranch):
            flags |= {p.requires_grad for p in child.parameters()}
            continue
        if (bias := attached.bias_of(adapter.name)) is not None:
            flags.add(bias.requires_grad)
        slots = child.slots()
        for slot, tensor in child.tensors().items():
            if slot_trains(slots[slot], tensor) or tensor.requires_grad:
                flags.add(tensor.requires_grad if slot_trains(slots[slot], tensor) else "irregular")
    return all_none_or_some(flags) if flags else False


def all_none_or_some(flags: Iterable[object]) -> AllNoneOrSome:
    """Returns True if all flags are true, False if none is, else "irregular"."""
    distinct = set(flags)
    if distinct <= {True}:
        return True
    return False if distinct == {False} else "irregular"


def trained_by_method(adapter: InsertedAdapter) -> int:
    """Returns how many parameters its method trains, even if they require no gradients now."""
    trained: dict[int, int] = {}
    for attached in attachments_by(adapter):
        child = attached[adapter.name]
        if isinstance(child, Copy | TokenRowsBranch):
            trained |= {id(p): element_count(p) for p in child.parameters()}
        else:
            slots = child.slots()
            if (bias := attached.bias_of(adapter.name)) is not None:
                trained[id(bias)] = element_count(bias)
            for slot, tensor in child.tensors().items():
                if slots[slot].trained:
                    trained[id(tensor)] = element_count(tensor)
    return sum(trained.values())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters of a model with its adapters train, and how many there are.

    Shared tensors count once. A quantised weight counts as its matrix, outputs × inputs, not as the
    bytes that hold it.

    >>> parameter_counts(nn.Linear(3, 2))
    (8, 8)
    """
    counted: dict[int, tuple[int, bool]] = {}
    modules = list(model.modules())
    adapters = {
        id(part) for module in modules if isinstance(module, Adapters) for part in module.modules()
    }
    for module in modules:
        if id(module) not in adapters:
            counted |= _base_counts(module)
    for adapter in adapters_in(model).values():
        counted |= {id(p): (element_count(p), p.requires_grad) for p in tensors_of(adapter)}
    trained = sum(count for count, requires_grad in counted.values() if requires_grad)
    return trained, sum(count for count, _ in counted.values())


def _base_counts(module: nn.Module) -> dict[int, tuple[int, bool]]:
    """Returns by `id` the size of each tensor that a module itself holds, and if it trains."""
    attached = attachments_or_none(module) or Attachments()
    originals = {**attached.base_before_merge, **attached.base_before_move}
    parameters = {
        name: originals.get(name, parameter)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    if not is_quantised(module):
        return {id(p): (_weights_in(p), p.requires_grad) for p in parameters.values()}
    outputs, inputs = shape_of(module)[:2]
    # Scales and zero points are part of the weight, so they are not counted.
    counts = {id(parameters.get("weight", module)): (outputs * inputs, False)}
    if (bias := parameters.get("bias")) is not None:
        counts[id(bias)] = element_count(bias), bias.requires_grad
    return counts


def _weights_in(parameter: Tensor) -> int:
    """Returns how many weights a parameter holds, also if bitsandbytes packs several in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return element_count(parameter) if shape is None else torch.Size(shape).numel()


def element_count(tensor: Tensor) -> int:
    """Returns how many elements a tensor has, in all processes together."""
    return torch.Size(whole_shape(tensor)).numel()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the memory of the tensors in this process, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def devices_of(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """Returns the devices of the tensors, sorted."""
    return tuple(sorted({str(tensor.device) for tensor in tensors}))
