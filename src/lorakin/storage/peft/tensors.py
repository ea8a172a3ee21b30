"""The tensors of single modules in PEFT's files: their keys and shapes.

A key is `base_model.model.` + the module's path + `.` + the tensor's name. lorakin's slots are
matrices and vectors. In a file, a convolution's A keeps its kernel, its B is a convolution of
kernel 1, and its magnitude lies along the channels:

    slot    lorakin              file
    A       (r, inputs·kernel)   (r, inputs, k…)
    B       (outputs, r)         (outputs, r, 1…)
    m       (outputs,)           (1, outputs, 1…)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.inject import layer_kinds
from lorakin.inject.layer_kinds import ConvolutionLayer, LayerKind
from lorakin.storage.document import Slots
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, PREFIX, PeftFormat, names


def keyed(
    peft_format: PeftFormat, path: str, kind: type[LayerKind], slots: Slots, module: nn.Module
) -> dict[str, Tensor]:
    """Returns the tensors of one module by PEFT's key and in PEFT's shapes, without shared ones."""
    named = names(peft_format, kind)
    return {
        f"{PREFIX}{path}.{named[slot]}": in_file(tensor, slot, module)
        for slot, tensor in slots.items()
        if slot not in peft_format.shared
    }


def in_file(tensor: Tensor, slot: str, module: nn.Module) -> Tensor:
    """Returns the tensor of a slot in the shape that PEFT gives it."""
    kernel = kernel_of(module)
    if not kernel:
        return tensor
    ones = (1,) * len(kernel)
    if slot == MAGNITUDE:
        return tensor.view(1, -1, *ones)
    if slot == DOWN:
        return tensor.view(len(tensor), -1, *kernel)
    return tensor.view(*tensor.shape, *ones)


def kernel_of(module: nn.Module) -> tuple[int, ...]:
    """Returns the kernel of a convolution; () for other layers."""
    if layer_kinds.kind_of(module) is not ConvolutionLayer:
        return ()
    kernel = module.kernel_size
    assert isinstance(kernel, tuple)
    return kernel


def as_matrices(slots: Slots) -> dict[str, Tensor]:
    """Returns the tensors of a module of a file in lorakin's shapes."""
    return {
        slot: t.reshape(-1) if slot == MAGNITUDE else t.flatten(1) if t.dim() > 2 else t
        for slot, t in slots.items()
    }


def by_module(
    peft_format: PeftFormat, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Returns the tensors by path and slot, and those without a slot by key without the prefix."""
    by_path: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    slot_of = {
        f".{name}": slot
        for table in (peft_format.slots, peft_format.lookup_slots)
        for slot, name in table.items()
    }
    for key, tensor in tensors.items():
        if key in peft_format.shared.values():
            continue
        bare = key.removeprefix(PREFIX)
        name = next((name for name in slot_of if bare.endswith(name)), None)
        if name is None:
            rest[bare] = tensor
        else:
            by_path.setdefault(bare.removesuffix(name), {})[slot_of[name]] = tensor
    return by_path, rest


def check_shapes(
    peft_format: PeftFormat,
    path: str,
    module: nn.Module,
    slots: Slots,
    expected: Slots,
    rank: int | str,
    where: str,
) -> None:
    """Checks that a module of the model has PEFT's tensors in PEFT's shapes.

    Args:
        peft_format: the form of the file.
        path: the module's path.
        module: the module.
        slots: its tensors as they are in the file.
        expected: the module's slots at the rank that the config says.
        rank: that rank.
        where: the file, for messages.

    Raises:
        AdapterError: a tensor is missing or unknown, or has another shape or dtype.
    """
    kind = layer_kinds.kind_of(module)
    assert kind is not None
    named = names(peft_format, kind)
    wanted = {slot: t for slot, t in expected.items() if slot in named}
    if missing := [named[slot] for slot in wanted if slot not in slots]:
        raise AdapterError(f"{where}: {path} lacks {', '.join(missing)}")
    if extra := [slot for slot in slots if slot not in wanted]:
        strange = ", ".join(named.get(slot, slot) for slot in extra)
        raise AdapterError(f"{where}: {path} has {strange}, which its config does not call for")
    for slot, tensor in wanted.items():
        shape, have = tuple(in_file(tensor, slot, module).shape), tuple(slots[slot].shape)
        if have != shape:
            raise AdapterError(
                f"{where}: {path}.{named[slot]} has shape {have}, expected {shape} for rank "
                f"{rank} on this base; the config, the file and the base model do not fit together"
            )
        if not slots[slot].is_floating_point():
            raise AdapterError(
                f"{where}: {path}.{named[slot]} is {slots[slot].dtype}, expected a floating type"
            )
