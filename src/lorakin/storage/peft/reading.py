"""A document of PEFT's two files, and of lorakin's own part where it is beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, SettingError, TargetError, some
from lorakin.family import Method, UnadaptedModule
from lorakin.family.slots import rank_factors, rank_switch
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
from lorakin.storage.peft.forms import LORA, TARGET_PARAMETERS, TOKENS, Form
from lorakin.storage.peft.renamed import todays
from lorakin.storage.peft.targets import check_targets
from lorakin.storage.peft.tensors import as_matrices, by_module, check_shapes


@dataclasses.dataclass(frozen=True)
class ReadFiles:
    """A config and its tensors, with a pair of its own for each module that has one."""

    form: Form
    method: Method
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    slots: dict[str, dict[str, Tensor]]
    """Path → slot → tensor, in the file's shapes."""
    rest: dict[str, Tensor]
    """Tensors in no slot, by key without prefix."""
    part: LorakinPart | None
    where: str

    @property
    def lorakin_slots(self) -> Mapping[str, Slots] | None:
        """The modules' tensors in lorakin's part, where PEFT's file has them in another form."""
        return None if self.part is None else self.part.tensors


def document_of(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    part: LorakinPart | None,
    model: nn.Module,
    where: str,
) -> Document:
    """The document of an adapter's files, for `match` with `model`.

    Args:
        config: what `adapter_config.json` says.
        tensors: the tensors by PEFT's key.
        part: lorakin's own part, if there is one.
        model: the base, which tells what names and shapes in the files mean.
        where: the file, for messages.

    Raises:
        AdapterError: something is missing, left over or unsupported, or belongs to another base;
            the files do not agree.
    """
    read = apart(config, tensors, part, model, where)
    modules = modules_for(model, {*read.slots, *(read.lorakin_slots or ())})
    former: Mapping[str, list[str]] = {}
    if read.lorakin_slots is None:
        now = todays(model, modules, read.config, read.slots, read.rest, where)
        read = dataclasses.replace(read, config=now.config, slots=now.slots, rest=now.rest)
        former = now.former
    check_paths(model, modules, read.slots, where)
    check_kinds(modules, read.slots, where)
    read, over_all = _ungrouped(read, modules)

    copies, own_biases, tokens = _others(read, model, modules)
    if read.form is not TOKENS:
        check_targets(modules, read.config, read.slots, copies, former, where)
    slots = _slots(read, model, modules)
    placement = dataclasses.replace(
        placement_of(read, slots, list(copies)),
        tokens=tokens.tokens,
        peft_grouped=over_all,
        biases=tuple(own_biases),
    )
    targets = targets_of(modules, placement)
    if read.lorakin_slots is None:
        for path, method in placement.methods.items():
            shape, rank = targets[path].shape, getattr(method.parametrisation, "rank", 0)
            there = {
                name: torch.empty(slot.sizes(rank, shape), device="meta")
                for name, slot in method.slots_at(path, shape).items()
            }
            check_shapes(read.form, path, modules[path], read.slots[path], there, rank, where)
        slots = _with_shared_pair(read, slots, targets)
    document = Document(placement, slots, copies, tokens.values, own_biases)
    if read.part is not None:
        document = dataclasses.replace(document, buffers=read.part.buffers, state=read.part.state)
    if read.lorakin_slots is not None:
        check_agreement(document, modules, targets, read.config, read.slots, where)
    return document


def apart(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    part: LorakinPart | None,
    model: nn.Module | None,
    where: str,
) -> ReadFiles:
    """The files with a pair for each module that has one, also without a model."""
    form = check_config(config, where)
    tensors = starts.without_training(tensors)
    known = None if part is None or part.tensors is None else part.tensors.keys()
    if config.get(TARGET_PARAMETERS) and part is not None:
        # PEFT has no dropout there, so lorakin's own part has the adapter's.
        dropouts = [entry.settings.get("dropout") for entry in part.members]
        config = {**config, "lora_dropout": next((dropout for dropout in dropouts if dropout), 0.0)}
    if model is not None:
        config, tensors = layer_weights.as_layers(config, tensors, model, where)
    ours = part is not None
    config, tensors = attention.apart(config, tensors, known, where, ours=ours)
    config, tensors = unstack_experts.unstacked(config, tensors, model, known, where, ours=ours)
    slots, rest = by_module(form, tensors)
    return ReadFiles(
        form, method_of(form, config, part, where), config, tensors, slots, rest, part, where
    )


def _ungrouped(
    read: ReadFiles, modules: Mapping[str, nn.Module]
) -> tuple[ReadFiles, frozenset[str]]:
    """With lorakin's form for grouped convolutions, and the paths whose pair is over all inputs."""
    if read.form is not LORA:
        return read, frozenset()
    config, slots, over_all = grouped.read(modules, read.slots, read.config, read.where)
    return dataclasses.replace(read, config=config, slots=slots), over_all


def _others(
    read: ReadFiles, model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], token_rows.Taken]:
    """Modules that are trained whole, biases and rows of tokens.

    Raises:
        AdapterError: they do not fit the model, or there are other tensors.
    """
    rest = biases.without_doubles(read.config, read.rest)
    copies, rest = whole_modules.split(modules, read.config, rest)
    if read.part is not None and read.part.whole is not None:
        copies = {path: state for path, state in copies.items() if path in read.part.whole}
    own_biases, rest = biases.split(
        model, modules, read.config, read.slots, copies, rest, read.where
    )
    rest = whole_modules.without_head_biases(modules, rest, read.where)
    sizes = {} if read.part is None or read.part.base is None else read.part.base["weights"]
    tokens = token_rows.taken(
        model, modules, read.config, rest, read.slots, copies, sizes, read.where
    )
    if tokens.rest:
        raise AdapterError(
            f"{read.where}: tensors that belong to nothing: {some(tokens.rest)}; the file is "
            "damaged or of another kind"
        )
    return copies, own_biases, tokens


def _slots(
    read: ReadFiles, model: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """The slots of all modules in the model's order: lorakin's own, else those in PEFT's file."""
    if read.lorakin_slots is None:
        return {path: as_matrices(read.slots[path]) for path in modules if path in read.slots}
    check_paths(model, modules, read.lorakin_slots, read.where)
    if absent := sorted(set(read.slots) - set(read.lorakin_slots)):
        raise AdapterError(f"{read.where}: lorakin.json lacks the tensors of {some(absent)}")
    return {path: dict(read.lorakin_slots[path]) for path in modules if path in read.lorakin_slots}


def placement_of(read: ReadFiles, slots: Mapping[str, Slots], copies: list[str]) -> Placement:
    """The placement, with the ranks and alphas that single modules have."""
    config = read.config
    if read.part is not None and read.lorakin_slots is not None:
        ranks, alphas = map(dict, read.part.patterns)
    elif read.form.has_patterns:
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
    """The placement, in which modules that lost ranks in training have fewer."""
    declared = placement.method.parametrisation.slots
    scale = rank_switch(declared)
    if scale is None or not rank_factors(declared):
        return placement
    said, name = read.config.get("rank_pattern") or {}, read.form.slots.get(scale)
    methods = {}
    for path, method in placement.methods.items():
        kept, there = said.get(f"{path}.{name}"), slots[path].get(scale)
        if isinstance(kept, list):
            rank = sum(kept)
        else:
            rank = len(there) if there is not None and there.dim() else 0
        initial: int = method.parametrisation.initial_rank  # type: ignore[attr-defined]
        methods[path] = method if rank == initial else method.with_settings(kept=rank)
    return dataclasses.replace(placement, methods=methods)


def _with_shared_pair(
    read: ReadFiles, slots: Mapping[str, Slots], targets: Mapping[str, UnadaptedModule]
) -> dict[str, dict[str, Tensor]]:
    """The slots, with the pair that all modules share in each of them."""
    remembered = None if read.part is None else read.part.projection
    shared = shared_pair.read(
        read.form, read.config, remembered, read.method, targets, read.tensors, read.where
    )
    return {path: {**part, **shared} for path, part in slots.items()}
