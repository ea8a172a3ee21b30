"""Where an adapter goes: its modules and their settings, decided before the model is touched."""

from __future__ import annotations

import dataclasses
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError
from lorakin.family import Method, Shape, UnadaptedModule
from lorakin.inject import layer_kinds, parameters
from lorakin.inject.adapted import is_adapted, module_at
from lorakin.inject.attachments import attachments_of
from lorakin.inject.biases import NO_BIASES, find_biases
from lorakin.inject.layer_kinds import ExpertLayer
from lorakin.inject.patterns import PatternValues
from lorakin.inject.targets import (
    ALL_LINEAR,
    Targets,
    check_patterns,
    for_stacks,
    select,
)
from lorakin.inject.trainable_tokens import TokenRows, Tokens, check_free, find_tokens, places_of
from lorakin.inject.whole_modules import find_modules


@dataclasses.dataclass(frozen=True)
class Placement:
    """What an adapter will be, decided and checked before the model is touched.

    `methods` has the method of each adapted module, with its own rank and alpha where a pattern
    gives it some; `copies` the paths of modules trained whole; `tokens` the rows of a module that
    are trained; `biases` the paths of modules whose bias is trained.
    """

    method: Method
    methods: Mapping[str, Method]
    whole_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peft_grouped: frozenset[str] = frozenset()
    """The grouped convolutions to which a pair over all their inputs is added."""
    tokens: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()


RANK_ABOVE = ("refuse", "clamp")
"""What becomes of a rank above the smaller side of a module's weight."""


def choose_modules(
    model: nn.Module,
    method: Method,
    targets: Targets = ALL_LINEAR,
    *,
    exclude: str | Sequence[str] = (),
    layer_indices: Sequence[int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    rank_above: str = "refuse",
    trainable_tokens: Tokens | None = None,
    bias: str = NO_BIASES,
) -> Placement:
    """Choose the modules and check every setting against them; see `lorakin.adapt`."""
    if rank_above not in RANK_ABOVE:
        raise SettingError(
            f"rank_above must be {' or '.join(map(repr, RANK_ABOVE))}, not {rank_above!r}"
        )
    try:
        rank_pattern = {key: operator.index(rank) for key, rank in dict(rank_pattern or {}).items()}
        alpha_pattern = {key: float(alpha) for key, alpha in dict(alpha_pattern or {}).items()}
    except (TypeError, ValueError):
        raise SettingError(
            f"rank_pattern and alpha_pattern map patterns to numbers, not {rank_pattern!r} and "
            f"{alpha_pattern!r}"
        ) from None
    copies = tuple(
        find_modules(
            model, [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()
        )
    )
    rows = find_tokens(model, trainable_tokens, copies=copies)
    paths = select(model, targets, exclude, layer_indices, reserved=copies, alone=bool(rows))
    stacks = {
        path.rpartition(".")[0]
        for path in paths
        if layer_kinds.kind_of(module_at(model, path)) is ExpertLayer
    }
    attentions = {path for path in map(parameters.attention_of, stacks) if path}
    rank_pattern = for_stacks(for_stacks(rank_pattern, attentions, parameters.PART), stacks)
    alpha_pattern = for_stacks(for_stacks(alpha_pattern, attentions, parameters.PART), stacks)
    check_patterns("rank_pattern", dict(rank_pattern), paths)
    check_patterns("alpha_pattern", dict(alpha_pattern), paths)
    method, paths = method.bound_to(paths)
    chosen = placement_with_patterns(method, paths, copies, rank_pattern, alpha_pattern)
    check_free(rows, chosen.methods)
    chosen = dataclasses.replace(chosen, tokens=rows)
    shapes = {path: target_of(module_at(model, path)).shape for path in chosen.methods}
    if rank_above == "clamp":
        chosen = _clamped(chosen, shapes, stacks)
    for path, there in chosen.methods.items():
        there.check(shapes[path], path)
    biases = find_biases(model, bias, chosen.methods, copies)
    if both := sorted(set(biases) & set(places_of(rows))):
        raise SettingError(
            f"{both[0]} cannot have rows of tokens and a bias of its own in one adapter; leave "
            f"one of them out"
        )
    return dataclasses.replace(chosen, biases=biases)


def _clamped(placement: Placement, shapes: Mapping[str, Shape], stacks: set[str]) -> Placement:
    """The placement in which no module has more ranks than its weight, as patterns would say it.

    A stack of experts whose matrices are all clamped has one pattern, as its files have.
    """
    settings = {path: there.clamped(shapes[path]) for path, there in placement.methods.items()}
    fewer = {path: own for path, own in settings.items() if own}
    if not fewer:
        return placement
    ranks = {path: next(iter(own.values())) for path, own in fewer.items()}
    said = ", ".join(f"{path} {rank}" for path, rank in list(ranks.items())[:5]) + (
        ", …" if len(ranks) > 5 else ""
    )
    warnings.warn(
        f"rank_above='clamp': {len(fewer)} of {len(placement.methods)} modules have the largest "
        f"rank that their weight allows ({said})",
        LorakinWarning,
        stacklevel=4,
    )
    methods = {
        path: there.with_settings(**fewer[path]) if path in fewer else there
        for path, there in placement.methods.items()
    }
    stacks = stacks - {path.rpartition(".")[0] for path in placement.methods.keys() - fewer.keys()}
    named = {
        path: path.rpartition(".")[0] if path.rpartition(".")[0] in stacks else path
        for path in fewer
    }
    own = {
        f"^{re.escape(named[path])}": ranks[path]
        for path, setting in fewer.items()
        if "rank" in setting
    }
    return dataclasses.replace(
        placement,
        methods=methods,
        rank_pattern=for_stacks(own, stacks) | dict(placement.rank_pattern),
    )


def rearranged(placement: Placement, settings: Mapping[str, Mapping[str, Any] | None]) -> Placement:
    """The placement with other settings for these modules, as patterns would say it.

    None in place of settings leaves a module out.
    """
    given = {path: own for path, own in settings.items() if own is not None}
    methods = {
        path: method.with_settings(**given[path]) if path in given else method
        for path, method in placement.methods.items()
        if settings.get(path, {}) is not None
    }
    patterns = {
        name: {f"^{re.escape(path)}": own[name] for path, own in given.items() if name in own}
        for name in ("rank", "alpha")
    }
    return dataclasses.replace(
        placement,
        methods=methods,
        rank_pattern=patterns["rank"] | dict(placement.rank_pattern),
        alpha_pattern=patterns["alpha"] | dict(placement.alpha_pattern),
    )


def placement_with_patterns(
    method: Method,
    paths: Sequence[str],
    copies: Sequence[str],
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> Placement:
    """The placement for modules already chosen: gives each its rank and alpha."""
    methods = {}
    values: dict[str, PatternValues[Any]] = {
        "rank": PatternValues(rank_pattern),
        "alpha": PatternValues(alpha_pattern),
    }
    for path in paths:
        said = {setting: value.of(path, None) for setting, value in values.items()}
        own = {setting: value for setting, value in said.items() if value is not None}
        methods[path] = method.with_settings(**own) if own else method
    return Placement(method, methods, tuple(copies), dict(rank_pattern), dict(alpha_pattern))


def target_of(module: nn.Module) -> UnadaptedModule:
    """The module's shape and its base weight as a matrix, also while adapters are merged."""
    kind = layer_kinds.kind_of(module)
    assert kind is not None
    return UnadaptedModule(kind.shape(module), kind.weight(module))


def base_weight_of(module: nn.Module) -> Tensor:
    """The module's base weight as a matrix (outputs, inputs).

    It is the base's own also while adapters are merged or have moved it.
    """
    kind = layer_kinds.kind_of(module)
    assert kind is not None
    aside = attachments_of(module).base_before_move.get("weight") if is_adapted(module) else None
    weight = kind.weight(module) if aside is None else kind.matrix(aside.detach())
    return weight if isinstance(weight, Tensor) else weight.matrix


def initial_tensors(
    model: nn.Module,
    placement: Placement,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """The method's initial tensors, for `InsertedAdapter.install`.

    They are drawn on the CPU, so that a seed means the same everywhere. `measured` is what a member
    that starts by data found, by path.
    """
    targets = {
        path: target_of(module_at(model, path))._replace(measured=(measured or {}).get(path))
        for path in placement.methods
    }
    meta = any(target.weight.device.type == "meta" for target in targets.values())
    device = torch.device("meta" if meta else "cpu")
    return placement.method.start(
        targets, placement.methods, None if meta else generator, device, dtype
    )
