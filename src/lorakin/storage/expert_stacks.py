"""PEFT's form for experts that a model keeps in one parameter (`target_parameters`), both ways.

lorakin has a pair for each expert, at `<parameter>.<number>`. PEFT has one for all, on the module that owns the parameter:

    lora_A.weight (experts·r, inputs)    row e·r + k is row k of expert e's A
    lora_B.weight (outputs, r·experts)   column k·experts + e is column k of expert e's B

Of several parameters of one module the last has the plain name and each one before it one more `base_layer.`. PEFT has no DoRA
there and refuses `use_dora`; its magnitudes are `lora_magnitude_vector` (experts, outputs) here, an extension of the form.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.family import Method
from lorakin.family.dora import row_norms
from lorakin.inject import parameters
from lorakin.inject.adapted import module_at
from lorakin.inject.experts import ExpertMatrix, count, stack_names
from lorakin.inject.patterns import resolve
from lorakin.inject.placement import own_weight
from lorakin.inject.targets import for_stacks
from lorakin.storage.expert_layout import (
    NAMES,
    NESTED,
    VERSION,
    WRITTEN,
    is_turned,
    layout,
    takes_last,
    turns,
)

FIELD = "target_parameters"


class PairScale(NamedTuple):
    """The rank and alpha of a pair, and how they make its scale."""

    rank: int
    alpha: float
    rslora: bool

    @property
    def value(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def scale_of(method: Method) -> PairScale:
    """What a method says of its pair; of one that has no such settings, nothing that is ever read."""
    pair = method.parametrisation
    return PairScale(
        getattr(pair, "rank", 0), getattr(pair, "alpha", 0.0), getattr(pair, "rslora", False)
    )


def scale_at(config: Mapping[str, Any], path: str) -> PairScale:
    """What a config of PEFT's says of the pair at `path`."""
    rank = resolve(config.get("rank_pattern") or {}, path, config.get("r", 8))
    alpha = resolve(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    return PairScale(int(rank or 0), float(alpha or 0), bool(config.get("use_rslora")))


def stacked(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PairScale],
    prefix: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of an adapter with the pairs of experts put together as PEFT has them; others stay as they are.

    `scales` are those of all its pairs, by path.
    """
    owners: dict[str, dict[str, dict[int, str]]] = {}
    for path in scales:
        if isinstance(module_at(model, path), ExpertMatrix):
            owner, name, number = path.rsplit(".", 2)
            owners.setdefault(owner, {}).setdefault(name, {})[int(number)] = path
    if not owners:
        return dict(config), dict(tensors)
    paths = {
        path
        for stacks in owners.values()
        for matrices in stacks.values()
        for path in matrices.values()
    }
    config = _without(config, paths)
    done, left, adapted, depths = dict[str, Tensor](), dict(tensors), list[str](), dict[str, int]()
    for owner, stacks in owners.items():
        names = [name for name in module_at(model, owner)._parameters if name in stacks]
        depths[owner] = len(names)
        for depth, name in enumerate(reversed(names)):
            there = {n: _taken(left, f"{prefix}{path}.") for n, path in stacks[name].items()}
            matrices = [
                module_at(model, f"{owner}.{name}.{n}")
                for n in range(experts_in(model, f"{owner}.{name}"))
            ]
            if is_turned(
                module_at(model, owner), name, takes_last(module_at(model, owner), WRITTEN)
            ):
                there = {number: _turned(slots) for number, slots in there.items()}
            scale, together = _together(
                there, {n: scales[path] for n, path in stacks[name].items()}, matrices
            )
            done |= {
                f"{prefix}{owner}.{NESTED * depth}{NAMES[slot]}": tensor
                for slot, tensor in together.items()
            }
            _set_scale(config, f"{owner}.{name}", scale)
        adapted += [f"{owner}.{name}" for name in names]
    wrapped = {
        _keyed(_wrapped, key, depths, prefix): tensor for key, tensor in (left | done).items()
    }
    said = {
        FIELD: adapted,
        VERSION: WRITTEN,
        "lora_dropout": 0.0,
    }  # of dropout there PEFT will hear nothing
    return {**config, **said}, wrapped


def are_whole(model: nn.Module, sites: Mapping[str, Method]) -> bool:
    """Whether every stack of which some expert is adapted has them all adapted alike, so that PEFT's form holds just that."""
    stacks: dict[str, list[Method]] = {}
    for path, method in sites.items():
        if isinstance(module_at(model, path), ExpertMatrix):
            stacks.setdefault(path.rpartition(".")[0], []).append(method)
    return all(
        len(methods) == experts_in(model, stack) and all(method == methods[0] for method in methods)
        for stack, methods in stacks.items()
    )


def _keyed(change: Callable[..., str], key: str, depths: Mapping[str, int], prefix: str) -> str:
    return prefix + change(key.removeprefix(prefix), depths) if key.startswith(prefix) else key


def _wrapped(path: str, depths: Mapping[str, int]) -> str:
    """The path in PEFT's model, where an owner's parts lie inside what wraps it, one deeper for each of its parameters."""
    inner = path
    for owner, depth in sorted(depths.items(), key=lambda item: -len(item[0])):
        if (
            path.startswith(f"{owner}.")
            and path.removeprefix(f"{owner}.").replace(NESTED, "") not in NAMES.values()
        ):
            inner = f"{owner}.{NESTED * depth}{inner[len(owner) + 1 :]}"
    return inner


def _unwrapped(path: str, depths: Mapping[str, int]) -> str:
    """The inverse of `_wrapped`."""
    for owner, depth in sorted(depths.items(), key=lambda item: len(item[0])):
        start = f"{owner}.{NESTED * depth}"
        path = f"{owner}.{path.removeprefix(start)}" if path.startswith(start) else path
    return path


def experts_in(model: nn.Module, stack: str) -> int:
    """How many matrices the parameter at this path holds."""
    owner, _, name = stack.rpartition(".")
    return count(module_at(model, owner)._parameters[name])  # type: ignore[arg-type]


def _turned(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the transposed change, (B·A)ᵀ = Aᵀ·Bᵀ."""
    return (
        {**slots, "A": slots["B"].T, "B": slots["A"].T}
        if {"A", "B"} <= slots.keys()
        else dict(slots)
    )


def _taken(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors of one module by slot, taken out of `tensors`."""
    return {
        slot: tensors.pop(start + name) for slot, name in NAMES.items() if start + name in tensors
    }


def _together(
    there: Mapping[int, Mapping[str, Tensor]],
    scales: Mapping[int, PairScale],
    matrices: list[nn.Module],
) -> tuple[PairScale, dict[str, Tensor]]:
    """The tensors of one stack, of the highest rank that one of its experts has, and their scale."""
    scale = max(scales.values(), key=lambda one: one.rank)
    some_A, some_B = next((slots["A"], slots["B"]) for slots in there.values())
    up = some_B.new_zeros(len(some_B), scale.rank, len(matrices))
    down = some_A.new_zeros(len(matrices), scale.rank, some_A.shape[1])
    for number, slots in there.items():
        factor = scales[number].value / scale.value
        rank = len(slots["A"])
        up[:, :rank, number] = slots["B"] if factor == 1 else factor * slots["B"]
        down[number, :rank] = slots["A"]
    parts = {"A": down.flatten(0, 1), "B": up.flatten(1)}
    if any("m" in slots for slots in there.values()):
        nothing = up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[2])
        lengths = [
            there[n]["m"] if n in there else row_norms(own_weight(matrix), *nothing)
            for n, matrix in enumerate(matrices)
        ]
        parts["m"] = torch.stack([length.to(up) for length in lengths])
    return scale, parts


def _without(config: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """The config without what it says of these modules one by one."""
    single = {f"^{re.escape(path)}" for path in paths}
    rest = {
        **config,
        "target_modules": [path for path in config["target_modules"] if path not in paths],
    }
    for field in ("rank_pattern", "alpha_pattern"):
        rest[field] = {
            key: value for key, value in rest.get(field, {}).items() if key not in single
        }
    return {
        field: value for field, value in rest.items() if value or not field.endswith("_pattern")
    }


def _set_scale(config: dict[str, Any], stack: str, scale: PairScale) -> None:
    """Let `config` say this rank and alpha of a stack."""
    for field, usual, value in (
        ("rank_pattern", "r", scale.rank),
        ("alpha_pattern", "lora_alpha", scale.alpha),
    ):
        patterns = config.get(field, {})
        if resolve(patterns, stack, config[usual]) != value:
            config[field] = {
                f"^{re.escape(stack)}": int(value) if float(value).is_integer() else value
            } | patterns


def unstacked(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module | None,
    known: Iterable[str] | None,
    where: str,
    prefix: str,
    *,
    ours: bool = False,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The files with a pair for each expert again, `target_parameters` and what belongs to it gone.

    Without a model, the parameters of one module are taken to be in transformers' order: down_proj is the last. `known` are
    the paths for which lorakin.json has tensors, if it has any; an expert beside them whose pair is zero is none. `ours`: the
    files are lorakin's.

    Raises:
        AdapterError: parameters that are no stack of experts in `model`, tensors that do not fit together, or files that leave
            open which sides are the inputs.
    """
    targets = config.get(FIELD)
    if not targets:
        return config, tensors
    apart, stacks = dict[str, Tensor](), []
    if model is not None:
        owners = list(_owners_in(model, targets, where))
    else:
        owners = list(
            _owners_by(tensors, targets, config.get("target_modules") or (), where, prefix)
        )
    depths = {owner: len(names) for owner, names in owners}
    left = {_keyed(_unwrapped, key, depths, prefix): tensor for key, tensor in tensors.items()}
    last: dict[str, bool | None] = {}
    if model is not None:
        last = layout(model, owners, left, WRITTEN if ours else config.get(VERSION), prefix)
    for owner, names in owners:
        for depth, name in enumerate(reversed(names)):
            slots, stack = _taken(left, f"{prefix}{owner}.{NESTED * depth}"), f"{owner}.{name}"
            if not slots and (elsewhere := _elsewhere(left, owner, prefix)):
                raise _otherwise_named(model, elsewhere, owner, where)
            stacks.append(stack)
            experts = None if model is None else experts_in(model, stack)
            turned = model is not None and turns(
                model, owner, name, last[owner], config.get(VERSION), where
            )
            for number, own in enumerate(
                _apart(slots, scale_at(config, stack).rank, experts, f"{where}: {stack}")
            ):
                path = f"{stack}.{number}"
                own = _turned(own) if turned else own
                if known is None or path in known or own["B"].any():
                    apart |= {
                        f"{prefix}{path}.{NAMES[slot]}": tensor for slot, tensor in own.items()
                    }
    counts = Counter(
        key.removeprefix(prefix).rsplit(".", 3)[0] for key in apart if key.endswith(NAMES["A"])
    )
    changed = {}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = {
            key: value
            for key, value in (config.get(field) or {}).items()
            if not _is_of_one(key, stacks, counts)
        }
        changed[field] = for_stacks(patterns, stacks)
    return {**config, FIELD: None, **changed}, left | apart


def _elsewhere(tensors: Iterable[str], owner: str, prefix: str) -> str | None:
    """The path of the same experts in the file, if it begins otherwise than `owner`."""
    for key in tensors:
        path = (
            key.removeprefix(prefix)
            .removesuffix(f".{NAMES['A']}")
            .replace(f".{NESTED.rstrip('.')}", "")
        )
        if (
            key.endswith(NAMES["A"])
            and path != owner
            and (f".{path}".endswith(f".{owner}") or f".{owner}".endswith(f".{path}"))
        ):
            return path
    return None


def _otherwise_named(model: nn.Module | None, there: str, here: str, where: str) -> AdapterError:
    return AdapterError(
        f"{where}: this {type(model).__name__} has the experts that it adapts, but under another name: {there} in the file is "
        f"{here} here. Load it into a model of the class that it was made on"
    )


def _is_of_one(key: str, stacks: Iterable[str], counts: Mapping[str, int]) -> bool:
    """Whether a pattern matches single experts of a stack and not the stack, so that it means nothing to PEFT."""
    one = {key: 1.0}
    return any(
        not resolve(one, stack, 0.0)
        and any(resolve(one, f"{stack}.{n}", 0.0) for n in range(counts[stack]))
        for stack in stacks
    )


def _owners_in(
    model: nn.Module, targets: Collection[str], where: str
) -> Iterator[tuple[str, list[str]]]:
    """The modules that own the parameters, and the names of those in the order in which PEFT wraps them."""
    taken = set[str]()
    for path, module in model.named_modules():
        hits = {
            name: {t for t in targets if f".{path}.{name}".endswith(f".{t}")}
            for name in module._parameters
        }
        hits = {name: by for name, by in hits.items() if by}
        names = [name for name in parameters.names(module) if name in hits]
        if wrong := sorted(hits.keys() - set(names)):
            raise AdapterError(
                f"{where}: it adapts the parameter {path}.{wrong[0]}, which is no matrix and no stack of them"
            )
        taken |= set[str]().union(*hits.values())
        if names:
            yield path, names
    if missing := sorted(set(targets) - taken):
        owners = (
            (missing[0].rpartition(".")[0], path)
            for path, module in model.named_modules()
            if path and stack_names(module)
        )
        if named := next((two for two in owners if two[0].endswith(f".{two[1]}")), None):
            raise _otherwise_named(model, *named, where)
        raise AdapterError(
            f"{where}: it is for another base model: it adapts the parameters {some(missing)}, which this "
            f"{type(model).__name__} does not have"
        )


def _owners_by(
    tensors: Iterable[str],
    targets: Collection[str],
    modules: Container[str],
    where: str,
    prefix: str,
) -> Iterator[tuple[str, list[str]]]:
    """The same from the tensors' keys alone, in the order that every model of transformers has: down_proj is the last.

    Others are in the order of `targets`, which is that of the module in files of ours.
    """
    order = {target.rpartition(".")[2]: number for number, target in enumerate(targets)}
    pattern = re.compile(re.escape(prefix) + r"(.+?)((?:\.base_layer)*)\.lora_A\.weight")
    depths = Counter(match[1] for key in tensors if (match := pattern.fullmatch(key)))
    for holder, depth in depths.items():
        named = {target.rpartition(".")[::2] for target in targets}
        names = {name for owner, name in named if owner and f".{holder}".endswith(f".{owner}")}
        if not names and holder.rpartition(".")[2] in modules:
            continue
        if len(names) < depth:
            names |= {name for owner, name in named if not owner}
        if len(names) == depth:
            yield holder, sorted(names, key=lambda name: (name.startswith("down"), order[name]))
        elif names:
            raise AdapterError(
                f"{where}: without its base it cannot be told which parameters of {holder} it adapts"
            )


def _apart(
    slots: Mapping[str, Tensor], rank: int, experts: int | None, where: str
) -> Iterator[dict[str, Tensor]]:
    """The tensors of each expert of one stack; as many as fit if it is not known how many there are."""
    if missing := [NAMES[slot] for slot in ("A", "B") if slot not in slots]:
        raise AdapterError(f"{where} lacks {', '.join(missing)}")
    A, B, m = slots["A"], slots["B"], slots.get("m")
    there = len(A) // max(rank, 1) if experts is None else experts
    fits = A.dim() == B.dim() == 2 and rank > 0 and len(A) == B.shape[1] == rank * there
    if not fits or (m is not None and m.shape != (there, len(B))):
        shapes = ", ".join(f"{NAMES[slot]} {tuple(tensor.shape)}" for slot, tensor in slots.items())
        raise AdapterError(
            f"{where}: {shapes} are no pairs of rank {rank} for {experts or 'any number of'} experts"
        )
    downs, ups = A.view(there, rank, -1), B.view(len(B), rank, there)
    for number in range(there):
        own = {"A": downs[number], "B": ups[..., number]}
        yield own if m is None else {**own, "m": m[number]}
