"""Checks that a document fits a model, by one list of checks, before anything is changed."""

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
from lorakin.inject.layer_kinds import PeftGroupedConvolution, unadapted
from lorakin.inject.placement import Placement
from lorakin.inject.targets import named_modules
from lorakin.storage.document import Document, Slots
from lorakin.storage.prefixes import other_prefix


def match(document: Document, model: nn.Module, where: str) -> Document:
    """Returns the document as it goes into `model`: in its order, shared tensors as one object.

    Args:
        document: the adapter.
        model: the base, which is left as it is.
        where: the file, for messages.

    Raises:
        AdapterError: a check of `CHECKS` fails.
    """
    matching = Matching(document, model, where)
    for check in CHECKS:
        check(matching)
    order = [path for path in matching.modules if path in document.slots]
    methods = {path: document.placement.methods[path] for path in order}
    return dataclasses.replace(
        document,
        placement=dataclasses.replace(document.placement, methods=methods),
        slots={path: matching.shared[path] for path in order},
    )


@dataclasses.dataclass(frozen=True)
class Matching:
    """A document and the model that it is to go into."""

    document: Document
    model: nn.Module
    where: str

    @property
    def placement(self) -> Placement:
        """The document's placement."""
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
    def empty_slots(self) -> dict[str, dict[str, Tensor]]:
        """Path → slots of a fresh adapter of this placement, on the meta device."""
        meta = torch.device("meta")
        targets = {
            path: target._replace(
                weight=torch.empty(target.weight.shape, dtype=target.weight.dtype, device=meta)
            )
            for path, target in self.targets.items()
        }
        return self.placement.method.start(targets, self.placement.methods, None, meta)

    @cached_property
    def slots(self) -> dict[str, dict[str, Tensor]]:
        """The document's slots in the order of a fresh adapter, on which optimizer states rely."""
        from_weight = slots_made_from_weight(self)
        return {
            path: _in_order({**slots, **from_weight.get(path, {})}, self.empty_slots[path])
            for path, slots in self.document.slots.items()
        }

    @cached_property
    def shared(self) -> dict[str, dict[str, Tensor]]:
        """`slots`, with one object wherever modules share a tensor."""
        order = {path: self.slots[path] for path in self.modules if path in self.slots}
        return self.document.method.share(order, self.targets, self.placement.methods)

    def error(self, message: str) -> AdapterError:
        """Returns an error about the file."""
        return AdapterError(f"{self.where}: {message}")


def modules_for(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Returns the modules of `model` by path; also the parameters that `paths` lie in."""
    return named_modules(model, {path.rpartition(".")[0] for path in paths})


def targets_of(
    modules: Mapping[str, nn.Module], placement: Placement
) -> dict[str, UnadaptedModule]:
    """Returns the shape and weight of each adapted module."""
    targets = {path: unadapted(modules[path]) for path in modules if path in placement.methods}
    for path in placement.peft_grouped & targets.keys():
        targets[path] = targets[path]._replace(shape=PeftGroupedConvolution.shape(modules[path]))
    return targets


def slots_made_from_weight(matching: Matching) -> dict[str, Slots]:
    """Returns, by path, the missing slots that the member can compute from the base weight.

    Such a slot never trains: PiSSA's and OLoRA's anchors, for a pair that PEFT wrote.

    Raises:
        AdapterError: the base weight is not in memory.
    """
    method = matching.document.method
    if WEIGHT not in method.needs:
        return {}
    computed: dict[str, Slots] = {}
    generator = torch.Generator()  # the global one must not advance
    for path, slots in matching.document.slots.items():
        target, methods = matching.targets[path], {path: matching.placement.methods[path]}
        declared = methods[path].slots_at(path, target.shape)
        lacking = [
            name
            for name in matching.empty_slots[path]
            if name not in slots and not declared[name].trained
        ]
        if not lacking:
            continue
        if has_no_values(target.weight):
            raise matching.error(
                f"{path} lacks {', '.join(lacking)}, which {method.words} computes from the base "
                "weight, but that is not in memory; load the base with its weights"
            )
        start = method.start({path: target}, methods, generator, torch.device("cpu"))
        computed[path] = {name: start[path][name] for name in lacking}
    return computed


def check_modules_exist(matching: Matching) -> None:
    """Checks that the model has all adapted modules."""
    check_paths(matching.model, matching.modules, matching.document.slots, matching.where)


def check_modules_adaptable(matching: Matching) -> None:
    """Checks that each of them is of a kind that can be adapted."""
    check_kinds(matching.modules, matching.document.slots, matching.where)


def check_tensors_finite(matching: Matching) -> None:
    """Checks that no tensor holds NaN, infinity, complex numbers or numbers of eight bits."""
    document = matching.document
    named = [
        (f"{path}.{key}", tensor)
        for by_path in (document.slots, document.whole_modules)
        for path, of_module in by_path.items()
        for key, tensor in of_module.items()
    ]
    for name, tensor in (*named, *document.rows.items(), *document.biases.items()):
        check_numbers(name, tensor, matching.where)


def check_whole_modules(matching: Matching) -> None:
    """Checks that modules that are trained whole have the parameters and buffers of the model's."""
    vocabulary = _vocabulary_of(matching.model)
    for path, state in matching.document.whole_modules.items():
        base = base_state(matching.modules[path])
        if missing := sorted(set(base) - set(state)):
            raise matching.error(f"the trained module {path} lacks {some(missing)}")
        if extra := sorted(set(state) - set(base)):
            raise matching.error(
                f"the trained module {path} has {some(extra)}, which this model's does not"
            )
        for key, present in base.items():
            saved = state[key]
            if present.shape != saved.shape:
                raise matching.error(
                    f"{path}.{key} has shape {tuple(saved.shape)}, this model's has "
                    f"{tuple(present.shape)}{_resize_advice(saved, present, vocabulary)}"
                )
            if present.is_floating_point() != saved.is_floating_point():
                raise matching.error(
                    f"{path}.{key} is {saved.dtype}, this model's is {present.dtype}"
                )


def check_slots_of_method(matching: Matching) -> None:
    """Checks that each module has the slots of the method, and no others."""
    for path, expected in matching.empty_slots.items():
        method, slots = matching.placement.methods[path], matching.slots[path]
        declared = method.slots_at(path, matching.targets[path].shape)
        if missing := [slot for slot, t in expected.items() if slot not in slots and t.numel()]:
            raise matching.error(f"{path} lacks {', '.join(missing)} of {method.words}")
        if extra := sorted(set(slots) - set(declared)):
            raise matching.error(
                f"{path} has {', '.join(extra)}, which {method.words} does not have"
            )


def check_slot_shapes(matching: Matching) -> None:
    """Checks that the slots of each module fit together, and the module's weight."""
    for path, expected in matching.empty_slots.items():
        method, slots = matching.placement.methods[path], matching.slots[path]
        shape = matching.targets[path].shape
        wrong = [slot for slot, t in slots.items() if not t.is_floating_point()]
        wrong += [
            slot
            for slot, t in expected.items()
            if slot in slots and t.dim() == 1 and t.numel() and slots[slot].shape != t.shape
        ]
        if wrong or not _fits(method, slots, shape):
            raise matching.error(
                f"the tensors of {path} do not fit {method.words} on this base "
                f"({', '.join(wrong or slots)})"
            )


def _fits(method: Method, slots: Slots, shape: Any) -> bool:
    """Returns whether the slots make a pair of this shape."""
    try:
        pair = method.low_rank({slot: t.to("meta") for slot, t in slots.items()}, shape)
    except (RuntimeError, IndexError):
        return False
    sides = pair.up.shape[0], pair.down.shape[1]
    return sides == shape[:2] and pair.up.shape[1] == pair.down.shape[0]


def check_shared_slots(matching: Matching) -> None:
    """Checks that modules that share a pair have the same values in it."""
    for path, slots in matching.shared.items():
        for slot, tensor in slots.items():
            saved = matching.slots[path][slot]
            if tensor is not saved and not torch.equal(tensor, saved):
                raise matching.error(
                    f"{path} shares its pair with others, but its {slot} in the file is another"
                )


def check_buffers(matching: Matching) -> None:
    """Checks that the base has the buffers that training changed."""
    if reason := refusal_of_buffers(matching.model, matching.document.buffers):
        raise matching.error(reason)


CHECKS: tuple[Callable[[Matching], None], ...] = (
    check_modules_exist,
    check_modules_adaptable,
    check_tensors_finite,
    check_whole_modules,
    check_slots_of_method,
    check_slot_shapes,
    check_shared_slots,
    check_buffers,
)
"""In this order. Biases and token rows are checked where a codec finds their modules."""


def check_paths(
    model: nn.Module, modules: Mapping[str, nn.Module], slots: Mapping[str, Slots], where: str
) -> None:
    """Raises `AdapterError` if the model lacks a module that is adapted."""
    unknown = [path for path in slots if path not in modules]
    if not unknown:
        return
    kind = type(model).__name__
    if len(unknown) == len(slots) and (prefix := other_prefix(slots, modules)):
        path = prefix.in_model + unknown[0].removeprefix(prefix.in_file)
        raise AdapterError(
            f"{where}: this {kind} has the modules that it adapts, but under other names: "
            f"{unknown[0]} in the file is {path} here. {prefix.advice}"
        )
    raise AdapterError(
        f"{where}: it is for another base model: it adapts {some(unknown)}, which this {kind} "
        "does not have"
    )


def check_kinds(modules: Mapping[str, nn.Module], paths: Iterable[str], where: str) -> None:
    """Raises `AdapterError` if one of the modules cannot be adapted."""
    for path in paths:
        if reason := layer_kinds.refusal(modules[path]):
            raise AdapterError(f"{where}: it adapts {path}, but that is {reason}")


def check_numbers(name: str, tensor: Tensor, where: str) -> None:
    """Raises `AdapterError` if a tensor is not of finite floating numbers of 16 bits or more."""
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
        raise AdapterError(
            f"{where}: tensor {name} is {tensor.dtype}; expected float32, float16, bfloat16 or "
            "float64"
        )
    if not tensor.is_meta and not all_finite(tensor):
        raise AdapterError(f"{where}: tensor {name} holds NaN or infinity")


def _in_order(slots: Slots, expected: Slots) -> dict[str, Tensor]:
    ordered = {slot: slots[slot] for slot in expected if slot in slots}
    return ordered | {slot: tensor for slot, tensor in slots.items() if slot not in ordered}


def _resize_advice(saved: Tensor, present: Tensor, vocabulary: int | None) -> str:
    """Returns what to do first if the two belong to vocabularies of different sizes; else ""."""
    is_table = saved.dim() == present.dim() > 0 and saved.shape[1:] == present.shape[1:]
    if not is_table or not len(present) == vocabulary != len(saved):
        return ""
    return (
        f": its vocabulary was resized. Resize this one to {len(saved)} first: "
        f"model.resize_token_embeddings({len(saved)})"
    )


def _vocabulary_of(model: nn.Module) -> int | None:
    """Returns the vocabulary's size by the model's config."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return getattr(text() if callable(text) else config, "vocab_size", None)
