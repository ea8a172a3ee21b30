"""Reads experts that a model keeps in one parameter; `stack_experts` describes the format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.inject import parameters
from lorakin.inject.experts import stack_names
from lorakin.inject.patterns import resolve
from lorakin.inject.targets import extend_to_stacks
from lorakin.storage.peft.expert_keys import (
    BASE_LAYER_PREFIX,
    experts_in,
    keyed,
    take,
    transposed,
    unwrapped,
)
from lorakin.storage.peft.expert_layout import (
    VERSION,
    WRITTEN_AS_PEFT,
    read_transposed_in_file,
    takes_last_by_owner,
)
from lorakin.storage.peft.formats import (
    DOWN,
    LORA_TENSOR_NAMES,
    MAGNITUDE,
    PREFIX,
    TARGET_PARAMETERS,
    UP,
)
from lorakin.storage.peft.scales import PATTERNS, scale_at

Owners = dict[str, list[str]]
"""Path of a module → names of its stacks, in the order in which PEFT wraps them."""


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module | None,
    recorded: Collection[str] | None,
    where: str,
    *,
    by_lorakin: bool = False,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Returns the config and tensors with a pair for each expert, without `target_parameters`.

    Args:
        config: PEFT's config.
        tensors: tensors by PEFT's key.
        model: the base. Without one, a module's stacks are taken to be in the order that all
            models of transformers have: down_proj is the last.
        recorded: the paths for which lorakin.json has tensors, if it has any. An expert that is not
            among them and whose pair is zero is not adapted.
        where: the file, for messages.
        by_lorakin: whether lorakin wrote the files.

    Raises:
        AdapterError: the parameters are not stacks of experts in `model`; the tensors do not fit
            together; the files do not tell which side of a stack is the inputs.
    """
    targets = config.get(TARGET_PARAMETERS)
    if not targets:
        return config, tensors
    owners = (
        _owners_by_keys(tensors, targets, config.get("target_modules") or (), where)
        if model is None
        else _owners_in(model, targets, where)
    )
    depths = {owner: len(names) for owner, names in owners.items()}
    left = {unwrapped(key, depths): tensor for key, tensor in tensors.items()}
    version = config.get(VERSION)
    takes_last: Mapping[str, bool | None] = {}
    if model is not None:
        takes_last = takes_last_by_owner(
            model, owners, left, WRITTEN_AS_PEFT if by_lorakin else version
        )
    per_expert: dict[str, Tensor] = {}
    stacks = [f"{owner}.{name}" for owner, names in owners.items() for name in reversed(names)]
    for owner, names in owners.items():
        for depth, name in enumerate(reversed(names)):
            stack = f"{owner}.{name}"
            slots = take(left, f"{PREFIX}{owner}.{BASE_LAYER_PREFIX * depth}")
            if not slots and (in_file := _path_in_file(left, owner)):
                raise _other_name_error(model, in_file, owner, where)
            experts = None if model is None else experts_in(model, stack)
            is_transposed = model is not None and read_transposed_in_file(
                model, owner, name, takes_last[owner], version, where
            )
            rank = scale_at(config, stack).rank
            split = _split_experts(slots, rank, experts, f"{where}: {stack}")
            for index, of_expert in enumerate(split):
                if is_transposed:
                    of_expert = transposed(of_expert)
                path = f"{stack}.{index}"
                if recorded is None or path in recorded or of_expert[UP].any():
                    per_expert |= keyed(f"{PREFIX}{path}.", of_expert)
    return _for_experts(config, stacks, per_expert), left | per_expert


def _for_experts(
    config: Mapping[str, Any], stacks: Collection[str], per_expert: Iterable[str]
) -> dict[str, Any]:
    """Returns the config, whose patterns now give each expert the rank and alpha of its stack."""
    paths = (
        key.removeprefix(PREFIX) for key in per_expert if key.endswith(LORA_TENSOR_NAMES[DOWN])
    )
    counts = Counter(path.rsplit(".", 3)[0] for path in paths)
    changed = {}
    for field, _ in PATTERNS:
        patterns = (config.get(field) or {}).items()
        used = {key: v for key, v in patterns if not _is_ignored_by_peft(key, stacks, counts)}
        changed[field] = extend_to_stacks(used, stacks)
    return {**config, TARGET_PARAMETERS: None, **changed}


def _is_ignored_by_peft(key: str, stacks: Iterable[str], counts: Mapping[str, int]) -> bool:
    """Returns whether a pattern matches single experts but not their stack."""
    pattern = {key: 1.0}
    return any(
        not resolve(pattern, stack, 0.0)
        and any(resolve(pattern, f"{stack}.{n}", 0.0) for n in range(counts[stack]))
        for stack in stacks
    )


def _path_in_file(tensors: Iterable[str], owner: str) -> str | None:
    """Returns the path of the same experts in the file, if it has another prefix than `owner`."""
    for key in tensors:
        path = key.removeprefix(PREFIX).removesuffix(f".{LORA_TENSOR_NAMES[DOWN]}")
        path = path.replace(f".{BASE_LAYER_PREFIX.rstrip('.')}", "")
        is_end = f".{path}".endswith(f".{owner}") or f".{owner}".endswith(f".{path}")
        if key.endswith(LORA_TENSOR_NAMES[DOWN]) and path != owner and is_end:
            return path
    return None


def _other_name_error(
    model: nn.Module | None, in_file: str, in_model: str, where: str
) -> AdapterError:
    return AdapterError(
        f"{where}: this {type(model).__name__} has the experts that the file adapts, but under "
        f"another name: {in_file} in the file is {in_model} here. Load the file into a model of "
        "the class that it was made for"
    )


def _owners_in(model: nn.Module, targets: Collection[str], where: str) -> Owners:
    """Returns the modules of `model` that own the parameters."""
    owners: Owners = {}
    taken: set[str] = set()
    for path, module in model.named_modules():
        hits = {
            name: {t for t in targets if f".{path}.{name}".endswith(f".{t}")}
            for name in module._parameters
        }
        hits = {name: matching for name, matching in hits.items() if matching}
        names = [name for name in parameters.adaptable_parameters(module) if name in hits]
        if wrong := sorted(hits.keys() - set(names)):
            raise AdapterError(
                f"{where}: it adapts the parameter {path}.{wrong[0]}, which is neither a matrix "
                "nor a stack of matrices"
            )
        taken |= set[str]().union(*hits.values())
        if names:
            owners[path] = names
    if missing := sorted(set(targets) - taken):
        raise _missing_error(model, missing, where)
    return owners


def _missing_error(model: nn.Module, missing: list[str], where: str) -> AdapterError:
    in_file = missing[0].rpartition(".")[0]
    for path, module in model.named_modules():
        if path and stack_names(module) and in_file.endswith(f".{path}"):
            return _other_name_error(model, in_file, path, where)
    return AdapterError(
        f"{where}: it is for another base model: it adapts the parameters {some(missing)}, which "
        f"this {type(model).__name__} does not have"
    )


def _owners_by_keys(
    tensors: Iterable[str], targets: Collection[str], modules: Collection[str], where: str
) -> Owners:
    """Returns the modules that own the parameters, from the keys of the tensors alone.

    Stacks are in the order of `targets`, which in lorakin's files is that of the module, with
    down_proj last.
    """
    order = {target.rpartition(".")[2]: number for number, target in enumerate(targets)}
    pattern = re.compile(re.escape(PREFIX) + r"(.+?)((?:\.base_layer)*)\.lora_A\.weight")
    depths = Counter(match[1] for key in tensors if (match := pattern.fullmatch(key)))
    named = {target.rpartition(".")[::2] for target in targets}
    owners: Owners = {}
    for holder, depth in depths.items():
        names = {name for owner, name in named if owner and f".{holder}".endswith(f".{owner}")}
        if not names and holder.rpartition(".")[2] in modules:
            continue
        if len(names) < depth:
            names |= {name for owner, name in named if not owner}
        if names and len(names) != depth:
            raise AdapterError(
                f"{where}: without the base it is not known which parameters of {holder} it adapts"
            )
        if names:
            owners[holder] = sorted(names, key=lambda name: (name.startswith("down"), order[name]))
    return owners


def _split_experts(
    slots: Mapping[str, Tensor], rank: int, experts: int | None, where: str
) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of each expert of one stack; `experts` is their number, if known."""
    if missing := [LORA_TENSOR_NAMES[slot] for slot in (DOWN, UP) if slot not in slots]:
        raise AdapterError(f"{where} lacks {', '.join(missing)}")
    A, B, m = slots[DOWN], slots[UP], slots.get(MAGNITUDE)
    count = len(A) // max(rank, 1) if experts is None else experts
    fits = A.dim() == B.dim() == 2 and rank > 0 and len(A) == B.shape[1] == rank * count
    if not fits or (m is not None and m.shape != (count, len(B))):
        shapes = ", ".join(
            f"{LORA_TENSOR_NAMES[slot]} {tuple(t.shape)}" for slot, t in slots.items()
        )
        raise AdapterError(
            f"{where}: {shapes} are not pairs of rank {rank} for {experts or 'any number of'} "
            "experts"
        )
    downs, ups = A.view(count, rank, -1), B.view(len(B), rank, count)
    for index in range(count):
        pair = {DOWN: downs[index], UP: ups[..., index]}
        yield pair if m is None else {**pair, MAGNITUDE: m[index]}
