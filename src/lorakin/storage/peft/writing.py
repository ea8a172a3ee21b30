"""Writes a document as PEFT's two files: `adapter_config.json` and the tensors of the adapter.

An adapter is written in PEFT's format for its method, if there is one that can hold it. If not, it
is written as plain LoRA with the same change, and lorakin's part holds its tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lorakin.family.slots import rank_switch
from lorakin.inject import layer_kinds
from lorakin.inject.adapted import module_at
from lorakin.inject.attachments import base_state
from lorakin.inject.layer_kinds import TransposedLayer
from lorakin.inject.patterns import is_inside
from lorakin.inject.targets import named_modules
from lorakin.storage.document import Document
from lorakin.storage.peft import attention, biases, grouped, stack_experts, token_rows
from lorakin.storage.peft.formats import (
    FLAGS,
    FORMAT_OF,
    LORA,
    NO_SCHEDULE,
    PREFIX,
    TOKENS_ONLY,
    PeftFormat,
)
from lorakin.storage.peft.scales import PATTERNS, int_if_whole, scale_of
from lorakin.storage.peft.tasks import task_of
from lorakin.storage.peft.tensors import keyed
from lorakin.storage.plain import as_plain, document_of_pairs, kind_at


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """What PEFT's two files hold."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """By key; contiguous, on the CPU."""
    peft_format: PeftFormat | None = None
    """The format that holds exactly the adapter's tensors; None if plain LoRA is written."""


def peft_files_of(document: Document, model: nn.Module) -> PeftFiles:
    """Returns PEFT's files of a document.

    The config has the fields that PEFT needs and those that differ from its defaults. Tensors,
    fields and lists are sorted, so that the same adapter gives the same bytes.
    """
    peft_format = native_format(document, model)
    if peft_format is not None:
        return dataclasses.replace(_files(document, peft_format, model), peft_format=peft_format)
    plain = as_plain(document, model)
    return _files(_with_grouped_convolutions(plain, model), LORA, model)


def native_format(document: Document, model: nn.Module) -> PeftFormat | None:
    """Returns PEFT's format that holds exactly the adapter's tensors; None if there is none."""
    placement = document.placement
    methods = placement.methods
    is_rows_alone = bool(placement.tokens) and not (methods or placement.whole_modules)
    if is_rows_alone and token_rows.stand_alone(placement.tokens):
        return TOKENS_ONLY
    peft_format = FORMAT_OF.get(document.method.parametrisation.word)
    if peft_format is None or (placement.tokens and not peft_format.takes_tokens):
        return None
    if (placement.rank_pattern or placement.alpha_pattern) and not peft_format.has_patterns:
        return None
    kinds = {kind_at(document, model, path) for path in methods}
    if not kinds.issubset(peft_format.layers):
        return None
    if any(layer_kinds.is_grouped(module_at(model, path)) for path in methods):
        return None
    if not (stack_experts.are_whole(model, methods) and attention.are_whole(model, methods)):
        return None
    format_slots = {*peft_format.slots, *peft_format.shared}
    holds_all = all(format_slots.issuperset(slots) for slots in document.slots.values())
    return peft_format if holds_all else None


def _with_grouped_convolutions(plain: Document, model: nn.Module) -> Document:
    """Returns a plain document with the pairs of grouped convolutions as PEFT has them."""
    modules = {path: module_at(model, path) for path in plain.slots}
    convolutions = {path: m for path, m in modules.items() if layer_kinds.is_grouped(m)}
    if not convolutions:
        return plain
    slots = dict(plain.slots)
    for path, module in convolutions.items():
        slots[path] = grouped.to_peft(module, slots[path])
    placement = document_of_pairs(model, slots, dropout=plain.method.dropout).placement
    placement = dataclasses.replace(
        placement,
        whole_modules=plain.placement.whole_modules,
        tokens=plain.placement.tokens,
        biases=plain.placement.biases,
    )
    return dataclasses.replace(plain, placement=placement, slots=slots)


def _files(document: Document, peft_format: PeftFormat, model: nn.Module) -> PeftFiles:
    """Returns the files of a document whose slots are those of `peft_format`."""
    placement = document.placement
    config = _heading(document, model) | _settings(document, peft_format)
    config["bias"] = biases.bias_setting(model, placement.biases, placement.methods, peft_format)
    tensors: dict[str, Tensor] = {}
    for path, slots in document.slots.items():
        module, kind = module_at(model, path), kind_at(document, model, path)
        tensors |= keyed(peft_format, path, kind, slots, module)
    if document.slots and document.method.setting("save_projection"):
        slots = next(iter(document.slots.values()))
        tensors |= {key: slots[slot] for slot, key in peft_format.shared.items()}

    scales = {path: scale_of(method) for path, method in placement.methods.items()}
    config, tensors, scales = attention.to_peft(model, config, tensors, scales)
    config, tensors = stack_experts.to_peft(model, config, tensors, scales)
    fields, rows = token_rows.to_peft(
        model, placement.tokens, document.rows, alone=peft_format is TOKENS_ONLY
    )
    whole_modules = {
        **document.whole_modules,
        **_also_wrapped_by_peft(model, document.whole_modules, placement.methods),
    }
    for path, state in whole_modules.items():
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in state.items()}
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in rows.items()}
    tensors |= biases.to_peft(document.biases, tensors)
    return PeftFiles(
        dict(sorted((config | fields).items())),
        {key: t.detach().to("cpu", copy=True).contiguous() for key, t in sorted(tensors.items())},
    )


def _heading(document: Document, model: nn.Module) -> dict[str, Any]:
    """Returns the fields that every config has."""
    placement = document.placement
    kinds = {layer_kinds.kind_of(module_at(model, path)) for path in placement.methods}
    whole_modules = {
        *placement.whole_modules,
        *_also_wrapped_by_peft(model, placement.whole_modules, placement.methods),
    }
    return {
        "task_type": task_of(model, whole_modules),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": kinds == {TransposedLayer},
        "inference_mode": True,
        "modules_to_save": sorted(placement.whole_modules) or None,
    }


def _settings(document: Document, peft_format: PeftFormat) -> dict[str, Any]:
    """Returns the fields of the method and of single modules."""
    placement, method = document.placement, document.resolved_method or document.method
    config: dict[str, Any] = {
        "peft_type": peft_format.peft_type,
        "target_modules": sorted(placement.methods),
    }
    for setting, field in peft_format.fields.items():
        value = method.setting(setting)
        value = NO_SCHEDULE.get(field) if value is None else value
        if field in peft_format.always_written or value != peft_format.defaults[field]:
            config[field] = int_if_whole(value)
    if method.has_gain and placement.methods:
        config |= dict.fromkeys(FLAGS, True)
    patterns = (placement.rank_pattern, placement.alpha_pattern)
    for (field, _), pattern in zip(PATTERNS, patterns, strict=True):
        if pattern:
            config[field] = {key: int_if_whole(value) for key, value in pattern.items()}
    switch = rank_switch(peft_format.pair_slots)
    if switch is not None and method.parametrisation.frees_ranks:
        kept = _ranks_kept(document, peft_format, switch)
        config |= {"rank_pattern": kept} if kept else {}
    return config


def _ranks_kept(document: Document, peft_format: PeftFormat, slot: str) -> dict[str, list[bool]]:
    """Returns `<path>.lora_E` → which of the initial ranks are left; {} if all are."""
    kept = {}
    for path, slots in document.slots.items():
        rank, initial = len(slots[slot]), document.method.setting("initial_rank")
        kept[f"{path}.{peft_format.slots[slot]}"] = [True] * rank + [False] * (initial - rank)
    return {} if all(all(row) for row in kept.values()) else kept


def _also_wrapped_by_peft(
    model: nn.Module, whole_modules: Collection[str], adapted: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """Returns the base's state of modules that PEFT wraps as trained whole although they are not.

    PEFT compares the ends of names. With "classifier" it wraps "pre_classifier" too, and fails on a
    file that does not hold it.
    """
    if not whole_modules:
        return {}
    ends = tuple(whole_modules)
    states = {}
    for path, module in named_modules(model).items():
        if not path.endswith(ends) or path in adapted or is_inside(path, whole_modules):
            continue
        if any(True for _ in module.parameters()):
            states[path] = base_state(module)
    return states
