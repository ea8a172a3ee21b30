"""Does a document fit a model? One list of checks, all of them before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.family import Method, UnadaptedModule, all_finite
from lorakin.family.measure import WEIGHT
from lorakin.family.weight import has_no_values
from lorakin.inject import layer_kinds
from lorakin.inject.attachments import base_state
from lorakin.inject.buffers import refusal_of_buffers
from lorakin.inject.layer_kinds import PeftGroupedConvolution
from lorakin.inject.placement import Placement, target_of
from lorakin.inject.targets import named_modules
from lorakin.storage.document import Document, Slots
from lorakin.storage.prefixes import other_prefix


def match(document: Document, model: nn.Module, where: str) -> Document:
    """The document as it goes into `model`: in the model's order, shared tensors as one object.

    Args:
        document: the adapter.
        model: the base, which is left as it is.
        where: the file, for messages.

    Raises:
        AdapterError: a check of `CHECKS` fails.
    """
    case = Case(document, model, where)
    for check in CHECKS:
        check(case)
    order = [path for path in case.modules if path in document.slots]
    methods = {path: document.placement.methods[path] for path in order}
    return dataclasses.replace(
        document,
        placement=dataclasses.replace(document.placement, methods=methods),
        slots={path: case.shared[path] for path in order},
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A document and the model that it is to go into."""

    document: Document
    model: nn.Module
    where: str

    @property
    def placement(self) -> Placement:
        """The document's."""
        return self.document.placement

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by path, experts and the like included."""
        return modules_for(self.model, self.document.slots)

    @cached_property
    def targets(self) -> dict[str, UnadaptedModule]:
        """Path → shape and weight of the adapted modules, in the document's order."""
        return targets_of(self.modules, self.placement)

    @cached_property
    def fresh(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a fresh adapter of this placement, without values."""
        return fresh(self.placement, self.targets)

    @cached_property
    def slots(self) -> dict[str, dict[str, Tensor]]:
        """The document's slots in the order of a fresh adapter, which its optimizer's state has."""
        made = slots_of_the_weight(self)
        return {
            path: _in_order({**own, **made.get(path, {})}, self.fresh[path])
            for path, own in self.document.slots.items()
        }

    @cached_property
    def shared(self) -> dict[str, dict[str, Tensor]]:
        """The same, with one object wherever modules share a tensor."""
        order = {path: self.slots[path] for path in self.modules if path in self.slots}
        return self.document.method.share(order, self.targets, self.placement.methods)

    def error(self, message: str) -> AdapterError:
        """An error about the file."""
        return AdapterError(f"{self.where}: {message}")


def modules_for(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of `model` by path, and the parameters without a layer that `paths` lie in."""
    return named_modules(model, {path.rpartition(".")[0] for path in paths})


def targets_of(
    modules: Mapping[str, nn.Module], placement: Placement
) -> dict[str, UnadaptedModule]:
    """Path → shape and weight of the adapted modules."""
    targets = {path: target_of(modules[path]) for path in modules if path in placement.methods}
    for path in placement.peft_grouped & targets.keys():
        targets[path] = targets[path]._replace(shape=PeftGroupedConvolution.shape(modules[path]))
    return targets


def fresh(
    placement: Placement, targets: Mapping[str, UnadaptedModule]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a fresh adapter of this placement, on the meta device."""
    meta = torch.device("meta")
    bare = {
        path: target._replace(
            weight=torch.empty(target.weight.shape, dtype=target.weight.dtype, device=meta)
        )
        for path, target in targets.items()
    }
    return placement.method.start(bare, placement.methods, None, meta)


def slots_of_the_weight(case: Case) -> dict[str, Slots]:
    """Path → slots that a file need not hold, since the member makes them of the base weight.

    Such a slot never trains: PiSSA's and OLoRA's anchors, for a pair that PEFT wrote.

    Raises:
        AdapterError: the base weight is not here.
    """
    method = case.document.method
    if WEIGHT not in method.needs:
        return {}
    made: dict[str, Slots] = {}
    generator = torch.Generator()  # so that nobody else's draws change
    for path, own in case.document.slots.items():
        target, methods = case.targets[path], {path: case.placement.methods[path]}
        declared = methods[path].slots_at(path, target.shape)
        lacking = [n for n in case.fresh[path] if n not in own and not declared[n].trained]
        if not lacking:
            continue
        if has_no_values(target.weight):
            raise case.error(
                f"{path} lacks {', '.join(lacking)}, which {method.words} makes of the base "
                "weight, but that is not in memory; load the base with its weights"
            )
        start = method.start({path: target}, methods, generator, torch.device("cpu"))
        made[path] = {name: start[path][name] for name in lacking}
    return made


def modules_are_there(case: Case) -> None:
    """The model has all adapted modules."""
    check_paths(case.model, case.modules, case.document.slots, case.where)


def modules_can_be_adapted(case: Case) -> None:
    """Each of them is of a kind that can be adapted."""
    check_kinds(case.modules, case.document.slots, case.where)


def numbers_are_sound(case: Case) -> None:
    """No tensor holds NaN, infinity, complex numbers or ones of eight bits."""
    document = case.document
    named = [
        (f"{path}.{key}", tensor)
        for by_path in (document.slots, document.copies)
        for path, own in by_path.items()
        for key, tensor in own.items()
    ]
    for name, tensor in (*named, *document.rows.items(), *document.biases.items()):
        check_numbers(name, tensor, case.where)


def whole_modules_fit(case: Case) -> None:
    """Modules that are trained whole have the parameters and buffers of the model's."""
    vocabulary = _vocabulary_of(case.model)
    for path, state in case.document.copies.items():
        wanted = base_state(case.modules[path])
        if missing := sorted(set(wanted) - set(state)):
            raise case.error(f"the trained module {path} lacks {some(missing)}")
        if extra := sorted(set(state) - set(wanted)):
            raise case.error(
                f"the trained module {path} has {some(extra)}, which this model's does not"
            )
        for key, here in wanted.items():
            there = state[key]
            if here.shape != there.shape:
                raise case.error(
                    f"{path}.{key} has shape {tuple(there.shape)}, this model's has "
                    f"{tuple(here.shape)}{_resize(there, here, vocabulary)}"
                )
            if here.is_floating_point() != there.is_floating_point():
                raise case.error(f"{path}.{key} is {there.dtype}, this model's is {here.dtype}")


def slots_are_the_methods(case: Case) -> None:
    """Each module has the slots of the method, and no others."""
    for path, fresh in case.fresh.items():
        method, slots = case.placement.methods[path], case.slots[path]
        known = method.slots_at(path, case.targets[path].shape)
        if missing := [slot for slot, t in fresh.items() if slot not in slots and t.numel()]:
            raise case.error(f"{path} lacks {', '.join(missing)} of {method.words}")
        if extra := sorted(set(slots) - set(known)):
            raise case.error(f"{path} has {', '.join(extra)}, which {method.words} does not have")


def slots_fit(case: Case) -> None:
    """The slots of each module fit together, and the module's weight."""
    for path, fresh in case.fresh.items():
        method, slots = case.placement.methods[path], case.slots[path]
        shape = case.targets[path].shape
        wrong = [slot for slot, t in slots.items() if not t.is_floating_point()]
        wrong += [
            slot
            for slot, t in fresh.items()
            if slot in slots and t.dim() == 1 and t.numel() and slots[slot].shape != t.shape
        ]
        if wrong or not _fits(method, slots, shape):
            raise case.error(
                f"the tensors of {path} do not fit {method.words} on this base "
                f"({', '.join(wrong or slots)})"
            )


def _fits(method: Method, slots: Slots, shape: Any) -> bool:
    """Whether the slots make a pair of this shape."""
    try:
        pair = method.low_rank({slot: t.to("meta") for slot, t in slots.items()}, shape)
    except (RuntimeError, IndexError):
        return False
    sides = pair.up.shape[0], pair.down.shape[1]
    return sides == shape[:2] and pair.up.shape[1] == pair.down.shape[0]


def shared_slots_are_equal(case: Case) -> None:
    """Modules that share a pair have the same numbers in it."""
    for path, slots in case.shared.items():
        for slot, tensor in slots.items():
            own = case.slots[path][slot]
            if tensor is not own and not torch.equal(tensor, own):
                raise case.error(
                    f"{path} shares its pair with others, but its {slot} in the file is another"
                )


def buffers_fit(case: Case) -> None:
    """The base has the buffers that training moved."""
    if reason := refusal_of_buffers(case.model, case.document.buffers):
        raise case.error(reason)


CHECKS: tuple[Callable[[Case], None], ...] = (
    modules_are_there,
    modules_can_be_adapted,
    numbers_are_sound,
    whole_modules_fit,
    slots_are_the_methods,
    slots_fit,
    shared_slots_are_equal,
    buffers_fit,
)
"""In this order. Biases and rows of tokens are checked where a codec finds their modules."""


def check_paths(
    model: nn.Module, modules: Mapping[str, nn.Module], slots: Mapping[str, Slots], where: str
) -> None:
    """Raise `AdapterError` if the model lacks a module that is adapted."""
    unknown = [path for path in slots if path not in modules]
    if not unknown:
        return
    kind = type(model).__name__
    if len(unknown) == len(slots) and (other := other_prefix(slots, modules)):
        here = other.here + unknown[0].removeprefix(other.there)
        raise AdapterError(
            f"{where}: this {kind} has the modules that it adapts, but under other names: "
            f"{unknown[0]} in the file is {here} here. {other.advice}"
        )
    raise AdapterError(
        f"{where}: it is for another base model: it adapts {some(unknown)}, which this {kind} "
        "does not have"
    )


def check_kinds(modules: Mapping[str, nn.Module], paths: Iterable[str], where: str) -> None:
    """Raise `AdapterError` if one of the modules cannot be adapted."""
    for path in paths:
        if reason := layer_kinds.refusal(modules[path]):
            raise AdapterError(f"{where}: it adapts {path}, but that is {reason}")


def check_numbers(name: str, tensor: Tensor, where: str) -> None:
    """Raise `AdapterError` if a tensor holds other numbers than an adapter's."""
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
        raise AdapterError(
            f"{where}: tensor {name} is {tensor.dtype}; expected float32, float16, bfloat16 or "
            "float64"
        )
    if not tensor.is_meta and not all_finite(tensor):
        raise AdapterError(f"{where}: tensor {name} holds NaN or infinity")


def _in_order(slots: Slots, fresh: Slots) -> dict[str, Tensor]:
    known = {slot: slots[slot] for slot in fresh if slot in slots}
    return known | {slot: tensor for slot, tensor in slots.items() if slot not in known}


def _resize(there: Tensor, here: Tensor, vocabulary: int | None) -> str:
    """What to do first if the two belong to vocabularies of different sizes."""
    is_table = there.dim() == here.dim() > 0 and there.shape[1:] == here.shape[1:]
    if not is_table or not len(here) == vocabulary != len(there):
        return ""
    return (
        f": its vocabulary was resized. Resize this one to {len(there)} first: "
        f"model.resize_token_embeddings({len(there)})"
    )


def _vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens the model knows, by its config."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return getattr(text() if callable(text) else config, "vocab_size", None)
