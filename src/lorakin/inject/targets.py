"""Which modules of a model an adapter changes: names, globs, regular expressions, or a function."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lorakin.errors import LorakinWarning, TargetError
from lorakin.inject import experts, layer_kinds, parameters
from lorakin.inject.attachments import Adapters, adapter_prefixes
from lorakin.inject.heads import head_of
from lorakin.inject.layer_numbers import in_layers
from lorakin.inject.linear_regex import NoPatternError, PatternError
from lorakin.inject.near_names import last_name, near, warn_of_unknown_words
from lorakin.inject.patterns import PathIndex, check_all, is_inside, matches

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
N = TypeVar("N")


def named_modules(model: nn.Module, also: Collection[str] = ()) -> dict[str, nn.Module]:
    """Returns the base's modules by path, and each matrix of a stack of experts as one.

    What adapters have attached to the model is left out.

    Args:
        model: the base, adapted or not.
        also: paths of other parameters whose matrices to return too.
    """
    modules: dict[str, nn.Module] = {}
    skip = adapter_prefixes(model)
    for path, module in model.named_modules():
        is_ours = isinstance(module, Adapters | experts.ExpertStack | experts.ExpertMatrix)
        if is_ours or path.startswith(skip):
            continue
        modules[path] = module
        stacks = set(experts.stack_names(module))
        stacks |= {n for n in parameters.adaptable_parameters(module) if f"{path}.{n}" in also}
        for stack in [name for name in module._parameters if name in stacks]:
            for n, matrix in enumerate(experts.matrices(module, stack)):
                modules[f"{path}.{stack}.{n}"] = matrix
    return modules


def paths_matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that `pattern` selects.

    It is taken as a name (a path or its last parts) if that selects any, else as a glob, else as a
    regular expression for the whole path.

    >>> paths_matching("q_proj", ["layers.0.q_proj", "layers.0.v_proj"])
    ['layers.0.q_proj']
    >>> paths_matching(r".*\\.[qv]_proj", ["layers.0.q_proj", "layers.0.v_proj"])
    ['layers.0.q_proj', 'layers.0.v_proj']
    """
    paths = list(paths)
    if by_name := [path for path in paths if path == pattern or path.endswith("." + pattern)]:
        return by_name
    if by_glob := [path for path in paths if fnmatch.fnmatchcase(path, pattern)]:
        return by_glob
    try:
        return [path for path in paths if matches(pattern, path)]
    except NoPatternError:
        return []


def _modules_matching(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the paths of `modules` that `pattern` selects.

    A pattern that selects a stack's parameter selects all of its matrices.
    """
    matrices = {path for path, m in modules.items() if isinstance(m, experts.ExpertMatrix)}
    stacks = {path.rpartition(".")[0] for path in matrices}
    selected = set(paths_matching(pattern, [*modules, *stacks]))
    selected |= set(parameters.attention_parts(selected, modules))
    whole_stacks = stacks & selected
    return [p for p in modules if p in selected or p.rpartition(".")[0] in whole_stacks]


def extend_to_stacks(
    pattern_values: Mapping[str, N], stacks: Iterable[str], of_matrix: str = r"(?:\.\d+)?"
) -> dict[str, N]:
    r"""Lets keys of `rank_pattern` or `alpha_pattern` that match a stack match its matrices too.

    `of_matrix` is a regular expression for what may follow the path of a stack.
    """
    index = PathIndex(stacks)

    def selects_stack(key: str) -> bool:
        try:
            return not key.endswith(of_matrix) and index.selects_any(key)
        except PatternError:
            # `check_patterns` reports it.
            return False

    return {
        f"(?:{key}){of_matrix}" if selects_stack(key) else key: value
        for key, value in pattern_values.items()
    }


def check_patterns(option: str, pattern_values: dict[str, float], paths: Iterable[str]) -> None:
    """Checks the keys of `rank_pattern` or `alpha_pattern`, the setting that `option` names.

    Raises:
        TargetError: a key is not a regular expression, or selects none of `paths`.
    """
    index = PathIndex(paths)
    try:
        check_all(option, pattern_values)
        unused = [key for key in pattern_values if not index.selects_any(key)]
    except PatternError as error:
        raise TargetError(f"{option}: {error}") from None
    if unused:
        hint = near(unused[0], index.paths)
        raise TargetError(f"{option}: {unused[0]!r} matches none of the adapted modules; {hint}")


def select(
    model: nn.Module,
    targets: Targets,
    exclude: str | Sequence[str] = (),
    layer_indices: Sequence[int] | None = None,
    reserved: Iterable[str] = (),
    may_be_empty: bool = False,
) -> list[str]:
    """Returns the paths of the modules to adapt, in the model's order.

    Args:
        model: the base.
        targets: "all-linear" (every linear layer but the head and gates of one output), a pattern
            or a list of them (see `matching`), or a function of (path, module). "none" or []
            adapts nothing, beside modules that are trained whole.
        exclude: patterns of modules to leave out.
        layer_indices: adapt only modules in these layers; see `in_layers`.
        reserved: paths of modules that are trained whole; nothing inside them is adapted.
        may_be_empty: something else is trained, so nothing need be adapted.

    Raises:
        TargetError: a pattern matches nothing, or only modules that cannot be adapted.

    >>> select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "all-linear")
    ['0']
    """
    patterns = [] if _is_function(targets) else _patterns(targets)
    reserved = tuple(reserved)
    if not _is_function(targets) and not patterns:
        if reserved or may_be_empty:
            return []
        raise TargetError("no targets given; name modules, or use targets='all-linear'")

    resolved = {pattern: _resolved(model, pattern) for pattern in patterns}
    paths = {path for paths in resolved.values() for path in paths}
    modules = named_modules(model, paths | {path.rpartition(".")[0] for path in paths})
    free = {path: m for path, m in modules.items() if path and not is_inside(path, reserved)}

    named: set[str] = set()
    if _is_function(targets):
        usable = [(path, module) for path, module in free.items() if layer_kinds.kind_of(module)]
        chosen = [path for path, module in usable if targets(path, module)]  # type: ignore[operator]
    else:
        linear = set(_all_linear(model, free)) if ALL_LINEAR in patterns else set()
        for pattern in patterns:
            if pattern != ALL_LINEAR:
                for path in resolved[pattern]:
                    named |= set(_layers_matching(path, free, reserved))
                warn_of_unknown_words(pattern, modules)
        chosen = [path for path in free if path in linear | named]

    chosen = _without_excluded(chosen, exclude, modules, free)
    if layer_indices is not None:
        chosen = in_layers(chosen, layer_indices)
    for path in chosen:
        if path in named and (reason := layer_kinds.refusal(free[path])):
            raise TargetError(
                f"{path} cannot be adapted: it is {reason}. Leave it out with exclude={path!r}"
            )
    chosen = _without_refused(chosen, modules)
    if not chosen:
        raise TargetError(_nothing_selected(model, patterns, free))
    return chosen


def _without_excluded(
    chosen: list[str],
    exclude: str | Sequence[str],
    modules: Mapping[str, nn.Module],
    free: Mapping[str, nn.Module],
) -> list[str]:
    for pattern in [exclude] if isinstance(exclude, str) else exclude or ():
        excluded = set(_modules_matching(pattern, modules))
        if not excluded:
            raise TargetError(f"exclude: {pattern!r} matches no module; {near(pattern, free)}")
        chosen = [path for path in chosen if path not in excluded]
    return chosen


def _nothing_selected(
    model: nn.Module, patterns: Sequence[str], free: Mapping[str, nn.Module]
) -> str:
    """Returns the message for targets that select no layer."""
    described = ", ".join(patterns) or "the targets function"
    kinds = sorted({type(m).__name__ for m in free.values() if layer_kinds.kind_of(m)})
    hint = f"its layers that can be adapted are of type {', '.join(kinds)}"
    hint = hint if kinds else "it has none to adapt"
    return f"{described} selects no layer of {type(model).__name__}; {hint}"


def _all_linear(model: nn.Module, free: Mapping[str, nn.Module]) -> list[str]:
    """Returns the linear layers among `free`, without the head and gates."""
    head = head_of(model)
    linear = (
        path
        for path, m in free.items()
        if layer_kinds.is_linear(m) and not layer_kinds.has_one_output_or_input(m)
    )
    return [path for path in linear if not is_inside(path, head)]


def _is_function(targets: object) -> bool:
    return callable(targets) and not isinstance(targets, type | nn.Module)


def _resolved(model: nn.Module, pattern: str) -> list[str]:
    """Returns the patterns or paths that a pattern stands for.

    A pattern that selects modules stands for itself, and for the parameters of attentions among
    them. Else it stands for the parameters with these paths, or for the layers whose weights they
    are.
    """
    modules = {path: module for path, module in named_modules(model).items() if path}
    if pattern == ALL_LINEAR:
        return [pattern]
    if selected := _modules_matching(pattern, modules):
        return [pattern, *parameters.attention_parts(selected, modules)]

    by_path = parameters.parameters_by_path(model)
    selected = paths_matching(pattern, by_path)
    if not selected:
        stem, _, number = pattern.rpartition(".")
        if pattern in model._parameters:
            raise TargetError(
                f"target {pattern!r} is a parameter of the model itself, whose class would have to "
                "change"
            )
        unlisted = [path for path in by_path if f"{path}.0" not in modules]
        if number.isdigit():
            selected = [f"{path}.{number}" for path in paths_matching(stem, unlisted)]
    return parameters.resolve_parameters(model, pattern, selected) or [pattern]


def _patterns(targets: object) -> list[str]:
    """Returns `targets` as a list of patterns; "all-linear" and "none" may be in any case."""
    several = isinstance(targets, Iterable) and not isinstance(targets, str)
    patterns = []
    for entry in targets if several else [] if targets is None else [targets]:  # type: ignore[attr-defined]
        if not isinstance(entry, str):
            raise TargetError(
                "targets must be names, globs or regular expressions as text, or a function, not "
                f"{entry!r}"
            )
        patterns.append(ALL_LINEAR if entry.lower() == ALL_LINEAR else entry)
    return [] if [pattern.lower() for pattern in patterns] == ["none"] else patterns


def _layers_matching(
    pattern: str, free: dict[str, nn.Module], reserved: Iterable[str]
) -> list[str]:
    """Returns the paths that `pattern` selects among the layers that can be adapted."""
    selected = _modules_matching(pattern, free)
    usable = [path for path in selected if layer_kinds.kind_of(free[path])]
    if usable:
        return usable
    if selected:
        parts = [p for p in free if is_inside(p, selected) and layer_kinds.kind_of(free[p])]
        hint = f"; it holds {', '.join(dict.fromkeys(map(last_name, parts)))}" if parts else ""
        reason = layer_kinds.refusal(free[selected[0]])
        raise TargetError(f"target {pattern!r} selects {selected[0]}, but that is {reason}{hint}")
    if reserved_paths := paths_matching(pattern, reserved):
        raise TargetError(
            f"target {pattern!r} selects {reserved_paths[0]}, which modules_to_save already trains "
            "whole; leave out one"
        )

    stack, _, number = pattern.rpartition(".")
    in_stack = _modules_matching(stack, free) if number.isdigit() else []
    if matrices := [path for path in in_stack if isinstance(free[path], experts.ExpertMatrix)]:
        highest = max(int(path.rpartition(".")[2]) for path in matrices)
        raise TargetError(
            f"target {pattern!r} matches no module; {stack} holds the experts 0 to {highest}"
        )
    adaptable = [path for path, module in free.items() if layer_kinds.kind_of(module)]
    raise TargetError(f"target {pattern!r} matches no module; {near(pattern, adaptable)}")


def _without_refused(chosen: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """Leaves out layers that cannot be adapted, with a warning of which and why."""
    refused = {path: reason for path in chosen if (reason := layer_kinds.refusal(modules[path]))}
    for path, reason in refused.items():
        warnings.warn(f"{path} is left out: it is {reason}", LorakinWarning, stacklevel=5)
    return [path for path in chosen if path not in refused]
