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
from lorakin.inject.layer_numbers import in_layers
from lorakin.inject.linear_regex import NoPatternError, PatternError
from lorakin.inject.near_names import last_name, near, warn_of_strangers
from lorakin.inject.patterns import PathIndex, check_all, matches

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
N = TypeVar("N")


def named_modules(model: nn.Module, named: Collection[str] = ()) -> dict[str, nn.Module]:
    """Returns the base's modules by path, and each matrix of a stack of experts as one.

    What adapters have hung on the model is left out.

    Args:
        model: the base, adapted or not.
        named: paths of other parameters whose matrices are wanted too.
    """
    found: dict[str, nn.Module] = {}
    skip = adapter_prefixes(model)
    for path, module in model.named_modules():
        ours_too = isinstance(module, Adapters | experts.ExpertStack | experts.ExpertMatrix)
        if ours_too or path.startswith(skip):
            continue
        found[path] = module
        stacks = experts.stack_names(module)
        others = {name for name in parameters.names(module) if f"{path}.{name}" in named}
        for stack in [name for name in module._parameters if name in stacks or name in others]:
            for n, matrix in enumerate(experts.matrices(module, stack)):
                found[f"{path}.{stack}.{n}"] = matrix
    return found


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that `pattern` selects.

    It is taken as a name (a path or its last parts) if that selects any, else as a glob, else as a
    regular expression for the whole path.

    >>> matching("q_proj", ["layers.0.q_proj", "layers.0.v_proj"])
    ['layers.0.q_proj']
    >>> matching(r".*\\.[qv]_proj", ["layers.0.q_proj", "layers.0.v_proj"])
    ['layers.0.q_proj', 'layers.0.v_proj']
    """
    paths = list(paths)
    named = [path for path in paths if path == pattern or path.endswith("." + pattern)]
    if found := named or [path for path in paths if fnmatch.fnmatchcase(path, pattern)]:
        return found
    try:
        return [path for path in paths if matches(pattern, path)]
    except NoPatternError:
        return []


def _matching_modules(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the paths of `modules` that `pattern` selects.

    A pattern that selects a stack's parameter selects all of its matrices.
    """
    matrices = {path for path, m in modules.items() if isinstance(m, experts.ExpertMatrix)}
    stacks = {path.rpartition(".")[0] for path in matrices}
    found = set(matching(pattern, [*modules, *stacks]))
    found |= set(parameters.parts_of(found, modules))
    whole = stacks & found
    return [path for path in modules if path in found or path.rpartition(".")[0] in whole]


def for_stacks(
    pattern_values: Mapping[str, N], stacks: Iterable[str], of_one: str = r"(?:\.\d+)?"
) -> dict[str, N]:
    r"""Lets keys of `rank_pattern` or `alpha_pattern` that match a stack match its matrices too.

    `of_one` is a regular expression for what may follow the path of a stack.
    """
    there = PathIndex(stacks)

    def reaches(key: str) -> bool:
        try:
            return not key.endswith(of_one) and there.selects_any(key)
        except PatternError:
            return False  # `check_patterns` reports it

    return {
        f"(?:{key}){of_one}" if reaches(key) else key: value
        for key, value in pattern_values.items()
    }


def check_patterns(option: str, pattern_values: dict[str, float], paths: Iterable[str]) -> None:
    """Checks the keys of `rank_pattern` or `alpha_pattern`, the setting that `option` names.

    Raises:
        TargetError: a key is no regular expression, or selects none of `paths`.
    """
    there = PathIndex(paths)
    try:
        check_all(option, pattern_values)
        strange = [key for key in pattern_values if not there.selects_any(key)]
    except PatternError as error:
        raise TargetError(f"{option}: {error}") from None
    if strange:
        hint = near(strange[0], there.paths)
        raise TargetError(f"{option}: {strange[0]!r} matches none of the adapted modules; {hint}")


def select(
    model: nn.Module,
    targets: Targets,
    exclude: str | Sequence[str] = (),
    layer_indices: Sequence[int] | None = None,
    reserved: Iterable[str] = (),
    alone: bool = False,
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
        alone: something else is trained, so nothing need be adapted.

    Raises:
        TargetError: a pattern matches nothing, or only modules that cannot be adapted.

    >>> select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "all-linear")
    ['0']
    """
    patterns = [] if _is_function(targets) else _patterns(targets)
    reserved = tuple(reserved)
    if not _is_function(targets) and not patterns:
        if reserved or alone:
            return []
        raise TargetError("no targets given; name modules, or use targets='all-linear'")

    means = {pattern: _means(model, pattern) for pattern in patterns}
    outright = {path for paths in means.values() for path in paths}
    modules = named_modules(model, outright | {path.rpartition(".")[0] for path in outright})
    free = {path: m for path, m in modules.items() if path and not is_inside(path, reserved)}

    named: set[str] = set()
    if _is_function(targets):
        usable = [(path, module) for path, module in free.items() if layer_kinds.kind_of(module)]
        chosen = [path for path, module in usable if targets(path, module)]  # type: ignore[operator]
    else:
        wanted = set(_all_linear(model, free)) if ALL_LINEAR in patterns else set()
        for pattern in patterns:
            if pattern != ALL_LINEAR:
                for meant in means[pattern]:
                    named |= set(_matching(meant, free, modules, reserved))
                warn_of_strangers(pattern, modules)
        chosen = [path for path in free if path in wanted | named]

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
        excluded = set(_matching_modules(pattern, modules))
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
    there = f"its layers that can be adapted are of type {', '.join(kinds)}"
    there = there if kinds else "it has none to adapt"
    return f"{described} selects no layer of {type(model).__name__}; {there}"


def head_of(model: nn.Module) -> list[str]:
    """Returns the paths of the model's head.

    That is what a transformers model holds outside its `base_model`, and its output embeddings.
    """
    paths = []
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(module) for module in base.modules()}
        paths = [path for path, m in model.named_modules() if path and id(m) not in inside]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    paths += [path for path, module in model.named_modules() if module is output]

    skip = adapter_prefixes(model)
    own = (path for path in dict.fromkeys(paths) if not f"{path}.".startswith(skip))
    return [path for path in own if any(True for _ in model.get_submodule(path).parameters())]


def new_heads(model: nn.Module, reached: Iterable[str]) -> list[str]:
    """Returns the paths of a task's heads that look untrained, and that no adapter trains.

    A new linear layer has a bias of zeros; without a bias nobody can tell. The output embedding of
    a language model is no such head: it comes with the model.

    Args:
        model: the base.
        reached: paths that adapters are on.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return []
    reached = tuple(reached)
    heads = [
        path for path in head_of(model) if not layer_kinds.is_container(model.get_submodule(path))
    ]
    new = []
    for path in heads:
        if is_inside(path, [other for other in heads if other != path]):
            continue
        linear = [m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)]
        biases = [m.bias for m in linear if m.bias is not None and not m.bias.is_meta]
        touched = any(is_inside(path, [one]) or is_inside(one, [path]) for one in reached)
        if linear and not touched and not any(bool(bias.any()) for bias in biases):
            new.append(path)
    return new


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


def _means(model: nn.Module, pattern: str) -> list[str]:
    """Returns what a pattern stands for.

    Where it selects modules that is itself, and the parameters of attentions among them. Otherwise
    it is the parameters with these paths, or the layers whose weights they are.
    """
    modules = {path: module for path, module in named_modules(model).items() if path}
    if pattern == ALL_LINEAR:
        return [pattern]
    if found := _matching_modules(pattern, modules):
        return [pattern, *parameters.parts_of(found, modules)]

    held = parameters.parameters(model)
    named = matching(pattern, held)
    if not named:
        stem, _, number = pattern.rpartition(".")
        if pattern in model._parameters:
            raise TargetError(
                f"target {pattern!r} is a parameter of the model itself, whose class would have to "
                "change"
            )
        unlisted = [path for path in held if f"{path}.0" not in modules]
        if number.isdigit():
            named = [f"{path}.{number}" for path in matching(stem, unlisted)]
    return parameters.meant(model, pattern, named) or [pattern]


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


def _matching(
    pattern: str, free: dict[str, nn.Module], modules: dict[str, nn.Module], reserved: Iterable[str]
) -> list[str]:
    """Returns the paths that `pattern` selects among the layers that can be adapted."""
    found = _matching_modules(pattern, free)
    usable = [path for path in found if layer_kinds.kind_of(free[path])]
    if usable:
        return usable
    if found:
        inside = [p for p in free if is_inside(p, found) and layer_kinds.kind_of(free[p])]
        hint = f"; it holds {', '.join(dict.fromkeys(map(last_name, inside)))}" if inside else ""
        reason = layer_kinds.refusal(free[found[0]])
        raise TargetError(f"target {pattern!r} selects {found[0]}, but that is {reason}{hint}")
    if whole := matching(pattern, reserved):
        raise TargetError(
            f"target {pattern!r} selects {whole[0]}, which modules_to_save already trains whole; "
            "leave out one"
        )

    stack, _, number = pattern.rpartition(".")
    others = _matching_modules(stack, free) if number.isdigit() else []
    if ones := [path for path in others if isinstance(free[path], experts.ExpertMatrix)]:
        highest = max(int(path.rpartition(".")[2]) for path in ones)
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


def is_inside(path: str, roots: Iterable[str]) -> bool:
    """Returns whether a path is one of `roots` or lies in one of them."""
    return any(path == root or path.startswith(root + ".") for root in roots)
