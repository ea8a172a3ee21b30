"""How many numbers a model and its adapters hold, which of them train, and where they are."""

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

Whether = bool | Literal["irregular"]
"""True for all, False for none, "irregular" for some."""


def attachments_by(adapter: InsertedAdapter) -> list[Attachments]:
    """The attachments of each of its modules; none for a module that has been replaced."""
    return adapter.tensors.attachments() if adapter.is_present else []


def tensors_of(adapter: InsertedAdapter) -> list[nn.Parameter]:
    """Its tensors, once each; none once the adapter is removed."""
    each = (p for attached in attachments_by(adapter) for p in attached[adapter.name].parameters())
    return list({id(parameter): parameter for parameter in each}.values())


def requires_grad(adapter: InsertedAdapter) -> Whether:
    """Whether the tensors that its method trains require gradients.

    "irregular" if only some do, or if another tensor does.
    """
    flags: set[Whether] = set()
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
    return whether(flags) if flags else False


def whether(flags: Iterable[object]) -> Whether:
    """True if all flags are, False if none is, else "irregular"."""
    found = set(flags)
    if found <= {True}:
        return True
    return False if found == {False} else "irregular"


def trained_by_method(adapter: InsertedAdapter) -> int:
    """How many numbers its method trains, whether or not they require gradients now."""
    trained: dict[int, int] = {}
    for attached in attachments_by(adapter):
        child = attached[adapter.name]
        if isinstance(child, Copy | TokenRowsBranch):
            trained |= {id(p): numbers(p) for p in child.parameters()}
        else:
            slots = child.slots()
            own = attached.bias_of(adapter.name)
            trained |= {} if own is None else {id(own): numbers(own)}
            trained |= {
                id(t): numbers(t) for slot, t in child.tensors().items() if slots[slot].trained
            }
    return sum(trained.values())


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers of the model and its adapters require gradients, and how many there are.

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
            counted |= _own_counts(module)
    for adapter in adapters_in(model).values():
        counted |= {id(p): (numbers(p), p.requires_grad) for p in tensors_of(adapter)}
    return sum(n for n, wanted in counted.values() if wanted), sum(n for n, _ in counted.values())


def _own_counts(module: nn.Module) -> dict[int, tuple[int, bool]]:
    """The numbers of each tensor that a module of the base holds itself, by identity."""
    attached = attachments_or_none(module) or Attachments()
    aside = {**attached.base_before_merge, **attached.base_before_move}
    own = {leaf: aside.get(leaf, p) for leaf, p in module._parameters.items() if p is not None}
    if not is_quantised(module):
        return {id(p): (_weights_in(p), p.requires_grad) for p in own.values()}
    plain = {leaf: p for leaf, p in own.items() if leaf == "bias"}
    outputs, inputs = shape_of(module)[:2]
    # Scales and zero points are part of the weight, so they are not counted.
    held = {id(own.get("weight", module)): (outputs * inputs, False)}
    return held | {id(p): (numbers(p), p.requires_grad) for p in plain.values()}


def _weights_in(parameter: Tensor) -> int:
    """How many numbers a parameter stands for, also if bitsandbytes packs several in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return numbers(parameter) if shape is None else torch.Size(shape).numel()


def numbers(tensor: Tensor) -> int:
    """How many numbers a tensor has, in all processes together."""
    return torch.Size(whole_shape(tensor)).numel()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The memory of the tensors in this process, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def devices_of(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """The devices of the tensors, in order."""
    return tuple(sorted({str(tensor.device) for tensor in tensors}))
