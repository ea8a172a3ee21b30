"""Reads the methods and pairs of an adapter's modules without its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakin.errors import AdapterError, some
from lorakin.family import Method, Pair, Shape
from lorakin.inject.placement import Placement
from lorakin.storage.document import Slots
from lorakin.storage.lorakin_part import LorakinPart
from lorakin.storage.match import check_numbers
from lorakin.storage.peft import grouped, token_rows
from lorakin.storage.peft.reading import ReadFiles, parsed_files, placement_of
from lorakin.storage.peft.tensors import as_matrices


def pairs_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], part: LorakinPart | None, where: str
) -> tuple[Placement, dict[str, Pair]]:
    """Returns the placement, and path → the module's pair without its gain.

    Only the base says how many inputs a module with VeRA has, so the largest number is taken. If a
    pair that all modules share is not in the file, there are no pairs.

    Raises:
        AdapterError: the files are damaged, incomplete, or beyond this version.
    """
    read = parsed_files(config, tensors, part, None, where)
    if read.lorakin_slots is None:
        _check(read)
        peft_format = read.peft_format
        shared = {
            slot: read.tensors[key]
            for slot, key in peft_format.shared.items()
            if key in read.tensors
        }
        needed = peft_format.slots.keys() & peft_format.pair_slots.keys()
        slots: Mapping[str, Slots] = {
            path: grouped.with_all_ranks(as_matrices(of_module)) | shared
            for path, of_module in read.slots.items()
        }
    else:
        slots, needed = read.lorakin_slots, set[str]()
    placement = placement_of(read, slots, [])
    for path, of_module in slots.items():
        if missing := sorted(read.peft_format.slots[n] for n in needed if n not in of_module):
            raise AdapterError(f"{where}: {path} lacks {', '.join(missing)}")
    shared_slots = read.peft_format.shared.keys()
    if shared_slots and not any(shared_slots <= of.keys() for of in slots.values()):
        return placement, {}
    return placement, {
        path: _pair(placement.methods[path], of_module, f"{where}: {path}")
        for path, of_module in slots.items()
    }


def _check(read: ReadFiles) -> None:
    """Checks what can be checked without the base: finite values, some tensors, no unknown ones."""
    for key, tensor in read.tensors.items():
        check_numbers(key, tensor, read.where)
    if not read.tensors:
        raise AdapterError(f"{read.where}: it holds no tensors, so it is not an adapter")
    for path, slots in read.slots.items():
        for slot, tensor in slots.items():
            if not tensor.is_floating_point():
                raise AdapterError(
                    f"{read.where}: {slot} of {path} is {tensor.dtype}; expected float32, float16 "
                    "or bfloat16"
                )
    # Tensors of modules trained whole, biases and token rows belong to no slot.
    belongs = (".weight", ".bias", token_rows.DELTA)
    whole_modules = read.config.get("modules_to_save") or ()
    stray = [
        key
        for key in read.rest
        if not key.endswith(belongs)
        and not any(f".{name}." in f".{key}." for name in whole_modules)
    ]
    if stray:
        raise AdapterError(
            f"{read.where}: tensors that belong to nothing: {some(stray)}; the file is damaged or "
            "of another kind"
        )


def _pair(method: Method, slots: Slots, where: str) -> Pair:
    """Returns the pair of these tensors, whatever the module's shape is."""
    shapes = ", ".join(f"{slot} {tuple(tensor.shape)}" for slot, tensor in slots.items())
    not_a_pair = AdapterError(f"{where}: its tensors are not a pair of {method.words}: {shapes}")
    try:
        shape = _shape(method, slots)
        pair = method.low_rank({slot: t.float() for slot, t in slots.items()}, shape)
    except (RuntimeError, IndexError, KeyError, TypeError):
        raise not_a_pair from None
    if pair.up.dim() != 2 or pair.down.dim() != 2 or pair.up.shape[1] != pair.down.shape[0]:
        raise not_a_pair
    return pair


def _shape(method: Method, slots: Slots) -> Shape:
    """Returns a module's shape, as far as its tensors tell."""
    sides: dict[str | int, int] = {}
    # What all modules share is as large as the largest needs, so the others come after it.
    declared = sorted(method.parametrisation.slots.items(), key=lambda item: not item[1].shared)
    for name, slot in declared:
        if name in slots:
            sides |= zip(slot.shape, slots[name].shape, strict=False)
    return Shape(sides["outputs"], sides["inputs"])
