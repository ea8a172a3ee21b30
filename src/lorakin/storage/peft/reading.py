"""Reads a document from PEFT's two files, and from lorakin's part if there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, SettingError, TargetError, some
from lorakin.family import Method, UnadaptedModule
from lorakin.family.slots import rank_switch
from lorakin.inject.placement import Placement, placement_with_patterns
from lorakin.storage.document import Document, Slots
from lorakin.storage.lorakin_part import LorakinPart
from lorakin.storage.match import check_kinds, check_paths, modules_for, targets_of
from lorakin.storage.peft import (
    attention,
    biases,
    grouped,
    layer_weights,
    shared_pair,
    starts,
    token_rows,
    unstack_experts,
    whole_modules,
)
from lorakin.storage.peft.agreement import check_agreement
from lorakin.storage.peft.config import check_config, method_of
from lorakin.storage.peft.formats import LORA, TARGET_PARAMETERS, TOKENS_ONLY, PeftFormat
from lorakin.storage.peft.renamed import renamed_files
from lorakin.storage.peft.targets import check_targets
from lorakin.storage.peft.tensors import as_matrices, by_module, check_shapes


@dataclasses.dataclass(frozen=True)
class ReadFiles:
    """A config and its tensors, with a pair for every single module, expert and attention part."""

    peft_format: PeftFormat
    method: Method
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    """Path → slot → tensor, in the file's shapes."""
    rest: dict[str, Tensor]
    """Tensors that belong to no slot, by key without prefix."""
    part: LorakinPart | None
    where: str

    @property
    def lorakin_slots(self) -> Mapping[str, Slots] | None:
        """The modules' tensors in lorakin's part, if PEFT's file has them as plain LoRA."""
        return None if self.part is None else self.part.tensors


def document_of(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    part: LorakinPart | None,
    model: nn.Module,
    where: str,
) -> Document:
    """Returns the document of an adapter's files, for `match` with `model`.

    Args:
        config: what `adapter_config.json` says.
        tensors: the tensors by PEFT's key.
        part: lorakin's part, if there is one.
        model: the base, which tells what names and shapes in the files mean.
        where: the file, for messages.

    Raises:
        AdapterError: something is missing, left over or unsupported, or belongs to another base;
            the files do not agree.
    """
    read = parsed_files(config, tensors, part, model, where)
    modules = modules_for(model, {*read.slots, *(read.lorakin_slots or ())})
    old_paths: Mapping[str, list[str]] = {}
    if read.lorakin_slots is None:
        renamed = renamed_files(model, modules, read.config, read.slots, read.rest, where)
        read = dataclasses.replace(
            read, config=renamed.config, slots=renamed.slots, rest=renamed.rest
        )
        old_paths = renamed.old_paths
    check_paths(model, modules, read.slots, where)
    check_kinds(modules, read.slots, where)
    read, across_groups = _with_grouped_convolutions(read, modules)

    trained_whole, trained_biases, tokens = _whole_modules_biases_tokens(read, model, modules)
    if read.peft_format is not TOKENS_ONLY:
        check_targets(modules, read.config, read.slots, trained_whole, old_paths, where)
    slots = _slots(read, model, modules)
    placement = dataclasses.replace(
        placement_of(read, slots, list(trained_whole)),
        tokens=tokens.tokens,
        peft_grouped=across_groups,
        biases=tuple(trained_biases),
    )
    targets = targets_of(modules, placement)
    if read.lorakin_slots is None:
        _check_shapes(read, placement, modules, targets)
        slots = _with_shared_pair(read, slots, targets)
    document = Document(placement, slots, trained_whole, tokens.values, trained_biases)
    if read.part is not None:
        document = dataclasses.replace(document, buffers=read.part.buffers, state=read.part.state)
    if read.lorakin_slots is not None:
        check_agreement(document, modules, targets, read.config, read.slots, where)
    return document


def _check_shapes(
    read: ReadFiles,
    placement: Placement,
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, UnadaptedModule],
) -> None:
    """Checks that PEFT's tensors have the shapes of the method's slots; raises `AdapterError`."""
    for path, method in placement.methods.items():
        shape, rank = targets[path].shape, getattr(method.parametrisation, "rank", 0)
        expected = {
            name: torch.empty(slot.sizes(rank, shape), device="meta")
            for name, slot in method.slots_at(path, shape).items()
        }
        module, slots = modules[path], read.slots[path]
        check_shapes(read.peft_format, path, module, slots, expected, rank, read.where)


def parsed_files(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    part: LorakinPart | None,
    model: nn.Module | None,
    where: str,
) -> ReadFiles:
    """Returns the files with a pair for every single module; `model` may be None."""
    peft_format = check_config(config, where)
    tensors = starts.without_training_tensors(tensors)
    recorded = None if part is None or part.tensors is None else part.tensors.keys()
    if config.get(TARGET_PARAMETERS) and part is not None:
        # PEFT has no dropout for parameters, so the adapter's is in lorakin's part.
        dropouts = [entry.settings.get("dropout") for entry in part.members]
        config = {**config, "lora_dropout": next((dropout for dropout in dropouts if dropout), 0.0)}
    if model is not None:
        config, tensors = layer_weights.as_layers(config, tensors, model, where)
    by_lorakin = part is not None
    config, tensors = attention.from_peft(config, tensors, recorded, where, by_lorakin=by_lorakin)
    config, tensors = unstack_experts.from_peft(
        config, tensors, model, recorded, where, by_lorakin=by_lorakin
    )
    slots, rest = by_module(peft_format, tensors)
    return ReadFiles(
        peft_format,
        method_of(peft_format, config, part, where),
        config,
        tensors,
        slots,
        rest,
        part,
        where,
    )


def _with_grouped_convolutions(
    read: ReadFiles, modules: Mapping[str, nn.Module]
) -> tuple[ReadFiles, frozenset[str]]:
    """Returns the files with lorakin's pairs for grouped convolutions.

    Also the paths of those whose pair reads inputs across groups.
    """
    if read.peft_format is not LORA:
        return read, frozenset()
    config, slots, across_groups = grouped.from_peft(modules, read.slots, read.config, read.where)
    return dataclasses.replace(read, config=config, slots=slots), across_groups


def _whole_modules_biases_tokens(
    read: ReadFiles, model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], token_rows.ReadTokenRows]:
    """Returns the modules that are trained whole, the biases and the token rows.

    Raises:
        AdapterError: they do not fit the model, or there are other tensors.
    """
    rest = biases.without_doubles(read.config, read.rest)
    states, rest = whole_modules.from_peft(modules, read.config, rest)
    if read.part is not None and read.part.whole is not None:
        states = {path: state for path, state in states.items() if path in read.part.whole}
    trained_biases, rest = biases.from_peft(
        model, modules, read.config, read.slots, states, rest, read.where
    )
    rest = whole_modules.without_head_biases(modules, rest, read.where)
    samples = {} if read.part is None or read.part.base is None else read.part.base["weights"]
    tokens = token_rows.from_peft(
        model, modules, read.config, rest, read.slots, states, samples, read.where
    )
    if tokens.rest:
        raise AdapterError(
            f"{read.where}: tensors that belong to nothing: {some(tokens.rest)}; the file is "
            "damaged or of another kind"
        )
    return states, trained_biases, tokens


def _slots(
    read: ReadFiles, model: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """Returns the slots of all modules in the model's order, from lorakin's part or PEFT's file."""
    if read.lorakin_slots is None:
        return {path: as_matrices(read.slots[path]) for path in modules if path in read.slots}
    check_paths(model, modules, read.lorakin_slots, read.where)
    if absent := sorted(set(read.slots) - set(read.lorakin_slots)):
        raise AdapterError(f"{read.where}: lorakin.json lacks the tensors of {some(absent)}")
    return {path: dict(read.lorakin_slots[path]) for path in modules if path in read.lorakin_slots}


def placement_of(read: ReadFiles, slots: Mapping[str, Slots], copies: list[str]) -> Placement:
    """Returns the placement, with the ranks and alphas of single modules."""
    config = read.config
    if read.part is not None and read.lorakin_slots is not None:
        ranks, alphas = map(dict, read.part.patterns)
    elif read.peft_format.has_patterns:
        ranks = dict(config.get("rank_pattern") or {})
        alphas = dict(config.get("alpha_pattern") or {})
    else:
        ranks, alphas = {}, {}
    try:
        placement = placement_with_patterns(read.method, list(slots), copies, ranks, alphas)
        return _with_ranks_kept(placement, read, slots)
    except (SettingError, TargetError) as error:
        raise AdapterError(f"{read.where}: {error}") from None


def _with_ranks_kept(
    placement: Placement, read: ReadFiles, slots: Mapping[str, Slots]
) -> Placement:
    """Returns the placement with the ranks that modules have left if training pruned some."""
    switch = rank_switch(placement.method.parametrisation.slots)
    if switch is None or not placement.method.parametrisation.frees_ranks:
        return placement
    patterns, name = read.config.get("rank_pattern") or {}, read.peft_format.slots.get(switch)
    methods = {}
    for path, method in placement.methods.items():
        kept, tensor = patterns.get(f"{path}.{name}"), slots[path].get(switch)
        if isinstance(kept, list):
            rank = sum(kept)
        else:
            rank = len(tensor) if tensor is not None and tensor.dim() else 0
        initial: int = method.parametrisation.initial_rank  # type: ignore[attr-defined]
        methods[path] = method if rank == initial else method.with_settings(kept=rank)
    return dataclasses.replace(placement, methods=methods)


def _with_shared_pair(
    read: ReadFiles, slots: Mapping[str, Slots], targets: Mapping[str, UnadaptedModule]
) -> dict[str, dict[str, Tensor]]:
    """Returns the slots of all modules with the pair that these share."""
    remembered = None if read.part is None else read.part.projection
    shared = shared_pair.read(
        read.peft_format, read.config, remembered, read.method, targets, read.tensors, read.where
    )
    return {path: {**of_module, **shared} for path, of_module in slots.items()}
