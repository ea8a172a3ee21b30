"""Where an adapter goes: its modules and their settings, decided before the model is touched."""

from __future__ import annotations

import dataclasses
import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError
from lorakin.family import Method, Shape
from lorakin.inject import layer_kinds, parameters
from lorakin.inject.adapted import is_adapted, module_at
from lorakin.inject.attachments import attachments_of
from lorakin.inject.biases import NO_BIASES, find_biases
from lorakin.inject.layer_kinds import ExpertLayer, unadapted
from lorakin.inject.patterns import PatternValues
from lorakin.inject.targets import (
    ALL_LINEAR,
    Targets,
    check_patterns,
    extend_to_stacks,
    select,
)
from lorakin.inject.trainable_tokens import (
    TokenRows,
    Tokens,
    check_no_pair_on_rows,
    find_tokens,
    paths_with_rows,
)
from lorakin.inject.whole_modules import find_whole_modules


@dataclasses.dataclass(frozen=True)
class Placement:
    """What an adapter will be, decided and checked before the model is touched.

    Attributes:
        method: the method as the user gave it.
        methods: path → the method of an adapted module, with the rank and alpha that patterns give.
        whole_modules: paths of modules that are trained whole (PEFT: `modules_to_save`).
        rank_pattern, alpha_pattern: the patterns that say the same in files.
        peft_grouped: paths of grouped convolutions with a pair over all their inputs, as PEFT's.
        tokens: path → the rows of the module that are trained.
        biases: paths of modules whose bias is trained.
    """

    method: Method
    methods: Mapping[str, Method]
    whole_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peft_grouped: frozenset[str] = frozenset()
    tokens: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()


N = TypeVar("N")
RANK_ABOVE = ("refuse", "clamp")
"""What can be done with a rank above the smaller side of a module's weight."""


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
    """Chooses the modules and checks every setting against them; see `lorakin.adapt`."""
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
    whole_names = [modules_to_save] if isinstance(modules_to_save, str) else modules_to_save or ()
    whole = tuple(find_whole_modules(model, whole_names))
    rows = find_tokens(model, trainable_tokens, whole_modules=whole)
    paths = select(model, targets, exclude, layer_indices, reserved=whole, may_be_empty=bool(rows))

    stacks = {
        path.rpartition(".")[0]
        for path in paths
        if layer_kinds.kind_of(module_at(model, path)) is ExpertLayer
    }
    rank_pattern = _for_parameters(rank_pattern, stacks)
    alpha_pattern = _for_parameters(alpha_pattern, stacks)
    check_patterns("rank_pattern", dict(rank_pattern), paths)
    check_patterns("alpha_pattern", dict(alpha_pattern), paths)

    method, paths = method.bound_to(paths)
    placement = placement_with_patterns(method, paths, whole, rank_pattern, alpha_pattern)
    check_no_pair_on_rows(rows, placement.methods)
    placement = dataclasses.replace(placement, tokens=rows)
    shapes = {path: unadapted(module_at(model, path)).shape for path in placement.methods}
    if rank_above == "clamp":
        placement = _clamped(placement, shapes, stacks)
    for path, method_of_module in placement.methods.items():
        method_of_module.check(shapes[path], path)

    biases = find_biases(model, bias, placement.methods, whole)
    if both := sorted(set(biases) & set(paths_with_rows(rows))):
        raise SettingError(
            f"an adapter cannot train both rows of tokens and the bias of {both[0]}; leave one of "
            "them out"
        )
    return dataclasses.replace(placement, biases=biases)


def _for_parameters(pattern_values: Mapping[str, N], stacks: Iterable[str]) -> dict[str, N]:
    """Lets patterns that match an attention or a stack of experts match its matrices too."""
    attentions = {path for path in map(parameters.attention_of, stacks) if path}
    of_attentions = extend_to_stacks(pattern_values, attentions, parameters.ATTENTION_PART)
    return extend_to_stacks(of_attentions, stacks)


def _clamped(placement: Placement, shapes: Mapping[str, Shape], stacks: set[str]) -> Placement:
    """Returns the placement in which no module has more ranks than its weight allows.

    Its patterns say so too. A stack of experts all of whose matrices are clamped has one pattern,
    as its files have.
    """
    settings = {path: method.clamped(shapes[path]) for path, method in placement.methods.items()}
    clamped = {path: lower for path, lower in settings.items() if lower}
    if not clamped:
        return placement

    ranks = {path: next(iter(lower.values())) for path, lower in clamped.items()}
    first = ", ".join(f"{path} {rank}" for path, rank in list(ranks.items())[:5])
    more = ", …" if len(ranks) > 5 else ""
    warnings.warn(
        f"rank_above='clamp': {len(clamped)} of {len(placement.methods)} modules have the largest "
        f"rank that their weight allows ({first}{more})",
        LorakinWarning,
        stacklevel=4,
    )

    methods = {
        path: method.with_settings(**clamped[path]) if path in clamped else method
        for path, method in placement.methods.items()
    }
    partly_clamped = {_parent(path) for path in placement.methods.keys() - clamped.keys()}
    clamped_stacks = stacks - partly_clamped
    pattern = {
        f"^{re.escape(_parent(path) if _parent(path) in clamped_stacks else path)}": ranks[path]
        for path, lower in clamped.items()
        if "rank" in lower
    }
    return dataclasses.replace(
        placement,
        methods=methods,
        rank_pattern=extend_to_stacks(pattern, clamped_stacks) | dict(placement.rank_pattern),
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def placement_with_settings(
    placement: Placement, settings: Mapping[str, Mapping[str, Any] | None]
) -> Placement:
    """Returns the placement with other settings for these modules; its patterns say so too.

    None in place of settings leaves a module out.
    """
    changed = {path: new for path, new in settings.items() if new is not None}
    methods = {
        path: method.with_settings(**changed[path]) if path in changed else method
        for path, method in placement.methods.items()
        if settings.get(path, {}) is not None
    }
    patterns = {
        name: {f"^{re.escape(path)}": new[name] for path, new in changed.items() if name in new}
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
    whole_modules: Sequence[str],
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> Placement:
    """Returns the placement for modules already chosen: gives each its rank and alpha."""
    methods = {}
    pattern_values: dict[str, PatternValues[Any]] = {
        "rank": PatternValues(rank_pattern),
        "alpha": PatternValues(alpha_pattern),
    }
    for path in paths:
        values = {setting: of.of(path, None) for setting, of in pattern_values.items()}
        settings = {setting: value for setting, value in values.items() if value is not None}
        methods[path] = method.with_settings(**settings) if settings else method
    return Placement(method, methods, tuple(whole_modules), dict(rank_pattern), dict(alpha_pattern))


def base_weight_of(module: nn.Module) -> Tensor:
    """Returns the module's base weight as a matrix (outputs, inputs).

    It is the base's also while adapters are merged or have moved it.
    """
    kind = layer_kinds.kind_of(module)
    assert kind is not None
    kept = attachments_of(module).base_before_move.get("weight") if is_adapted(module) else None
    weight = kind.weight(module) if kept is None else kind.matrix(kept.detach())
    return weight if isinstance(weight, Tensor) else weight.matrix


def initial_tensors(
    model: nn.Module,
    placement: Placement,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Returns the method's initial tensors, for `InsertedAdapter.install`.

    They are drawn on the CPU, so that a seed means the same everywhere. `measured` is what a member
    that starts by data has found, by path.
    """
    modules = {
        path: unadapted(module_at(model, path))._replace(measured=(measured or {}).get(path))
        for path in placement.methods
    }
    has_meta = any(module.weight.device.type == "meta" for module in modules.values())
    device = torch.device("meta" if has_meta else "cpu")
    return placement.method.start(
        modules, placement.methods, None if has_meta else generator, device, dtype
    )
