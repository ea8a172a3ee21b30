"""PEFT's two files of a document: `adapter_config.json` and the tensors of the adapter.

An adapter whose tensors are PEFT's is written as it is. Any other one is written as plain LoRA with
the same function; lorakin's own part then holds the tensors as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lorakin.family.slots import rank_factors, rank_switch
from lorakin.inject import layer_kinds
from lorakin.inject.adapted import module_at
from lorakin.inject.attachments import base_state
from lorakin.inject.layer_kinds import TransposedLayer
from lorakin.inject.targets import named_modules
from lorakin.storage.document import Document
from lorakin.storage.peft import attention, biases, grouped, stack_experts, token_rows
from lorakin.storage.peft.forms import FLAGS, FORM_OF, LORA, NO_SCHEDULE, PREFIX, TOKENS, Form
from lorakin.storage.peft.scales import PATTERNS, scale_of, whole
from lorakin.storage.peft.tasks import task_of
from lorakin.storage.peft.tensors import keyed
from lorakin.storage.plain import as_plain, document_of_pairs, kind_at


@dataclasses.dataclass(frozen=True)
class PeftFiles:
    """What PEFT's two files hold."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """By key; contiguous, on the CPU."""
    form: Form | None = None
    """The form that holds exactly the adapter's tensors; None if plain LoRA is in their stead."""


def peft_files_of(document: Document, model: nn.Module) -> PeftFiles:
    """The files of a document.

    The config has the fields that PEFT needs and those that differ from its defaults. Tensors,
    fields and lists are sorted, so that the same adapter gives the same bytes.
    """
    form = native_form(document, model)
    if form is not None:
        return dataclasses.replace(_files(document, form, model), form=form)
    plain = as_plain(document, model)
    return _files(_in_groups(plain, model), LORA, model)


def native_form(document: Document, model: nn.Module) -> Form | None:
    """PEFT's form that holds exactly the adapter's tensors; None if it has none."""
    placement = document.placement
    methods = placement.methods
    is_rows_alone = bool(placement.tokens) and not (methods or placement.whole_modules)
    if is_rows_alone and token_rows.stand_alone(placement.tokens):
        return TOKENS
    form = FORM_OF.get(document.method.parametrisation.word)
    if form is None or (placement.tokens and not form.takes_tokens):
        return None
    if (placement.rank_pattern or placement.alpha_pattern) and not form.has_patterns:
        return None
    kinds = {kind_at(document, model, path) for path in methods}
    if not kinds.issubset(form.layers):
        return None
    if any(layer_kinds.is_grouped(module_at(model, path)) for path in methods):
        return None
    if not (stack_experts.are_whole(model, methods) and attention.are_whole(model, methods)):
        return None
    known = {*form.slots, *form.shared}
    return form if all(known.issuperset(slots) for slots in document.slots.values()) else None


def _in_groups(plain: Document, model: nn.Module) -> Document:
    """A plain document with the pairs of grouped convolutions as PEFT has them."""
    modules = {path: module_at(model, path) for path in plain.slots}
    in_groups = {path: module for path, module in modules.items() if layer_kinds.is_grouped(module)}
    if not in_groups:
        return plain
    slots = dict(plain.slots)
    for path, module in in_groups.items():
        slots[path] = grouped.written(module, slots[path])
    placement = document_of_pairs(model, slots, dropout=plain.method.dropout).placement
    placement = dataclasses.replace(
        placement,
        whole_modules=plain.placement.whole_modules,
        tokens=plain.placement.tokens,
        biases=plain.placement.biases,
    )
    return dataclasses.replace(plain, placement=placement, slots=slots)


def _files(document: Document, form: Form, model: nn.Module) -> PeftFiles:
    """The files of a document whose slots are those of `form`."""
    placement = document.placement
    config = _heading(document, model) | _settings(document, form)
    config["bias"] = biases.word(model, placement.biases, placement.methods, form)
    tensors: dict[str, Tensor] = {}
    for path, slots in document.slots.items():
        tensors |= keyed(form, path, kind_at(document, model, path), slots, module_at(model, path))
    if document.slots and document.method.setting("save_projection"):
        slots = next(iter(document.slots.values()))
        tensors |= {key: slots[slot] for slot, key in form.shared.items()}

    scales = {path: scale_of(method) for path, method in placement.methods.items()}
    config, tensors, scales = attention.joined(model, config, tensors, scales)
    config, tensors = stack_experts.stacked(model, config, tensors, scales)
    fields, rows = token_rows.to_files(model, placement.tokens, document.rows, alone=form is TOKENS)
    whole_modules = {
        **document.whole_modules,
        **_wrapped_too(model, document.whole_modules, placement.methods),
    }
    for path, state in whole_modules.items():
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in state.items()}
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in rows.items()}
    tensors |= biases.keyed(document.biases, tensors)
    return PeftFiles(
        dict(sorted((config | fields).items())),
        {key: t.detach().to("cpu", copy=True).contiguous() for key, t in sorted(tensors.items())},
    )


def _heading(document: Document, model: nn.Module) -> dict[str, Any]:
    """The fields that every config has."""
    placement = document.placement
    kinds = {layer_kinds.kind_of(module_at(model, path)) for path in placement.methods}
    whole_modules = {
        *placement.whole_modules,
        *_wrapped_too(model, placement.whole_modules, placement.methods),
    }
    return {
        "task_type": task_of(model, whole_modules),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": kinds == {TransposedLayer},
        "inference_mode": True,
        "modules_to_save": sorted(placement.whole_modules) or None,
    }


def _settings(document: Document, form: Form) -> dict[str, Any]:
    """The fields of the method and of single modules."""
    placement, method = document.placement, document.resolved_method or document.method
    config: dict[str, Any] = {
        "peft_type": form.peft_type,
        "target_modules": sorted(placement.methods),
    }
    for setting, field in form.fields.items():
        value = method.setting(setting)
        value = NO_SCHEDULE.get(field) if value is None else value
        if field in form.always or value != form.defaults[field]:
            config[field] = whole(value)
    if method.has_gain and placement.methods:
        config |= dict.fromkeys(FLAGS, True)
    own = (placement.rank_pattern, placement.alpha_pattern)
    for (field, _), pattern in zip(PATTERNS, own, strict=True):
        if pattern:
            config[field] = {key: whole(value) for key, value in pattern.items()}
    scale = rank_switch(form.pair_slots)
    if scale and rank_factors(form.pair_slots) and (kept := _ranks_kept(document, form, scale)):
        config["rank_pattern"] = kept
    return config


def _ranks_kept(document: Document, form: Form, slot: str) -> dict[str, list[bool]]:
    """`<path>.lora_E` → which of the initial ranks are left, if any module has lost some."""
    kept = {}
    for path, slots in document.slots.items():
        rank, initial = len(slots[slot]), document.method.setting("initial_rank")
        kept[f"{path}.{form.slots[slot]}"] = [True] * rank + [False] * (initial - rank)
    return {} if all(all(row) for row in kept.values()) else kept


def _wrapped_too(
    model: nn.Module, whole_modules: Collection[str], adapted: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """Modules that PEFT takes for trained whole although they are not: path → the base's state.

    PEFT goes by the ends of names. With "classifier" it wraps "pre_classifier" too, and fails on a
    file that does not hold it.
    """
    if not whole_modules:
        return {}
    ends, inside = tuple(whole_modules), tuple(f"{path}." for path in whole_modules)
    found = {}
    for path, module in named_modules(model).items():
        taken = path in whole_modules or path in adapted or path.startswith(inside)
        if path.endswith(ends) and not taken and any(True for _ in module.parameters()):
            found[path] = base_state(module)
    return found
