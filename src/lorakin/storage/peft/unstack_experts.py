"""Reading experts that a model keeps in one parameter; `stack_experts` has the form."""

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
from lorakin.inject.targets import for_stacks
from lorakin.storage.peft.expert_keys import NESTED, experts_in, keyed, take, turned, unwrapped
from lorakin.storage.peft.expert_layout import VERSION, WRITTEN, layout, turns
from lorakin.storage.peft.forms import NAMES, PREFIX, TARGET_PARAMETERS
from lorakin.storage.peft.scales import PATTERNS, scale_at

Owners = dict[str, list[str]]
"""Path of a module → names of its stacks, in the order in which PEFT wraps them."""


def unstacked(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module | None,
    known: Collection[str] | None,
    where: str,
    *,
    ours: bool = False,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The config and tensors with a pair for each expert again, without `target_parameters`.

    Args:
        config: PEFT's config.
        tensors: tensors by PEFT's key.
        model: the base. Without one, a module's stacks are taken to be in the order that all
            models of transformers have: down_proj is the last.
        known: the paths for which lorakin.json has tensors, if it has any. An expert beside them
            whose pair is zero is not adapted.
        where: the file, for messages.
        ours: lorakin wrote the files.

    Raises:
        AdapterError: the parameters are no stacks of experts in `model`; the tensors do not fit
            together; the files leave open which side of a stack is the inputs.
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
    last = {} if model is None else layout(model, owners, left, WRITTEN if ours else version)
    apart: dict[str, Tensor] = {}
    stacks = [f"{owner}.{name}" for owner, names in owners.items() for name in reversed(names)]
    for owner, names in owners.items():
        for depth, name in enumerate(reversed(names)):
            slots, stack = take(left, f"{PREFIX}{owner}.{NESTED * depth}"), f"{owner}.{name}"
            if not slots and (elsewhere := _elsewhere(left, owner)):
                raise _otherwise_named(model, elsewhere, owner, where)
            experts = None if model is None else experts_in(model, stack)
            is_turned = model is not None and turns(model, owner, name, last[owner], version, where)
            rank = scale_at(config, stack).rank
            for number, own in enumerate(_apart(slots, rank, experts, f"{where}: {stack}")):
                path = f"{stack}.{number}"
                if known is None or path in known or own["A" if is_turned else "B"].any():
                    apart |= keyed(f"{PREFIX}{path}.", turned(own) if is_turned else own)
    return _for_experts(config, stacks, apart), left | apart


def _for_experts(
    config: Mapping[str, Any], stacks: Collection[str], apart: Iterable[str]
) -> dict[str, Any]:
    """The config, whose patterns now give each expert the rank and alpha of its stack."""
    paths = (key.removeprefix(PREFIX) for key in apart if key.endswith(NAMES["A"]))
    counts = Counter(path.rsplit(".", 3)[0] for path in paths)
    changed = {}
    for field, _ in PATTERNS:
        said = (config.get(field) or {}).items()
        meant = {key: value for key, value in said if not _is_of_one(key, stacks, counts)}
        changed[field] = for_stacks(meant, stacks)
    return {**config, TARGET_PARAMETERS: None, **changed}


def _is_of_one(key: str, stacks: Iterable[str], counts: Mapping[str, int]) -> bool:
    """Whether a pattern matches single experts but not their stack, so that PEFT ignores it."""
    one = {key: 1.0}
    return any(
        not resolve(one, stack, 0.0)
        and any(resolve(one, f"{stack}.{n}", 0.0) for n in range(counts[stack]))
        for stack in stacks
    )


def _elsewhere(tensors: Iterable[str], owner: str) -> str | None:
    """The path of the same experts in the file, if it begins otherwise than `owner`."""
    for key in tensors:
        path = key.removeprefix(PREFIX).removesuffix(f".{NAMES['A']}")
        path = path.replace(f".{NESTED.rstrip('.')}", "")
        is_end = f".{path}".endswith(f".{owner}") or f".{owner}".endswith(f".{path}")
        if key.endswith(NAMES["A"]) and path != owner and is_end:
            return path
    return None


def _otherwise_named(model: nn.Module | None, there: str, here: str, where: str) -> AdapterError:
    return AdapterError(
        f"{where}: this {type(model).__name__} has the experts that the file adapts, but under "
        f"another name: {there} in the file is {here} here. Load the file into a model of the "
        "class that it was made for"
    )


def _owners_in(model: nn.Module, targets: Collection[str], where: str) -> Owners:
    """The modules of `model` that own the parameters."""
    owners: Owners = {}
    taken: set[str] = set()
    for path, module in model.named_modules():
        hits = {
            name: {t for t in targets if f".{path}.{name}".endswith(f".{t}")}
            for name in module._parameters
        }
        hits = {name: by for name, by in hits.items() if by}
        names = [name for name in parameters.names(module) if name in hits]
        if wrong := sorted(hits.keys() - set(names)):
            raise AdapterError(
                f"{where}: it adapts the parameter {path}.{wrong[0]}, which is neither a matrix "
                "nor a stack of matrices"
            )
        taken |= set[str]().union(*hits.values())
        if names:
            owners[path] = names
    if missing := sorted(set(targets) - taken):
        raise _missing(model, missing, where)
    return owners


def _missing(model: nn.Module, missing: list[str], where: str) -> AdapterError:
    there = missing[0].rpartition(".")[0]
    for path, module in model.named_modules():
        if path and stack_names(module) and there.endswith(f".{path}"):
            return _otherwise_named(model, there, path, where)
    return AdapterError(
        f"{where}: it is for another base model: it adapts the parameters {some(missing)}, which "
        f"this {type(model).__name__} does not have"
    )


def _owners_by_keys(
    tensors: Iterable[str], targets: Collection[str], modules: Collection[str], where: str
) -> Owners:
    """The same from the keys of the tensors alone.

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
                f"{where}: it cannot be told without the base which parameters of {holder} "
                "it adapts"
            )
        if names:
            owners[holder] = sorted(names, key=lambda name: (name.startswith("down"), order[name]))
    return owners


def _apart(
    slots: Mapping[str, Tensor], rank: int, experts: int | None, where: str
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each expert of one stack; `experts` is None if their number is not known."""
    if missing := [NAMES[slot] for slot in ("A", "B") if slot not in slots]:
        raise AdapterError(f"{where} lacks {', '.join(missing)}")
    A, B, m = slots["A"], slots["B"], slots.get("m")
    there = len(A) // max(rank, 1) if experts is None else experts
    fits = A.dim() == B.dim() == 2 and rank > 0 and len(A) == B.shape[1] == rank * there
    if not fits or (m is not None and m.shape != (there, len(B))):
        shapes = ", ".join(f"{NAMES[slot]} {tuple(t.shape)}" for slot, t in slots.items())
        raise AdapterError(
            f"{where}: {shapes} are no pairs of rank {rank} for {experts or 'any number of'} "
            "experts"
        )
    downs, ups = A.view(there, rank, -1), B.view(len(B), rank, there)
    for number in range(there):
        own = {"A": downs[number], "B": ups[..., number]}
        yield own if m is None else {**own, "m": m[number]}
