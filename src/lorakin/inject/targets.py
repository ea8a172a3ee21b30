"""Which modules of a model an adapter changes: names, globs, regular expressions, layers, or a function."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lorakin.errors import LorakinWarning, SettingError, TargetError
from lorakin.inject import experts, layers, parameters, quantised
from lorakin.inject.attachments import Adapters, ours
from lorakin.inject.patterns import NoPatternError, Paths, PatternError, check_all, matches

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"
MOST_LAYERS = 10_000
"""Layers in one range of `layers`."""
N = TypeVar("N")


def named_modules(model: nn.Module, named: Collection[str] = ()) -> dict[str, nn.Module]:
    """Path → module of the base model, each matrix of a stack of experts included; not what an adapter has attached on it.

    `named` are the paths of other parameters whose matrices are to be among them.
    """
    found: dict[str, nn.Module] = {}
    skip = ours(model)
    for path, module in model.named_modules():
        ours_too = isinstance(module, Adapters | experts.ExpertStack | experts.ExpertMatrix)
        if ours_too or path.startswith(skip):
            continue
        found[path] = module
        stacks = experts.stack_names(module)
        others = {name for name in parameters.names(module) if f"{path}.{name}" in named}
        for stack in [name for name in module._parameters if name in stacks or name in others]:
            found |= {
                f"{path}.{stack}.{n}": matrix
                for n, matrix in enumerate(experts.matrices(module, stack))
            }
    return found


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that `pattern` selects: as a name (a path or its last parts), else as a glob, else as a regular expression."""
    paths = list(paths)
    named = [path for path in paths if path == pattern or path.endswith("." + pattern)]
    if found := named or [path for path in paths if fnmatch.fnmatchcase(path, pattern)]:
        return found
    try:
        return [path for path in paths if matches(pattern, path)]
    except NoPatternError:
        return []


def _matching_modules(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of `modules` that `pattern` selects; of a stack of experts, selected as the parameter that it is, all."""
    stacks = {
        path.rpartition(".")[0]
        for path, module in modules.items()
        if isinstance(module, experts.ExpertMatrix)
    }
    found = set(matching(pattern, [*modules, *stacks]))
    found |= set(parameters.parts_of(found, modules))
    whole = stacks & found
    return [path for path in modules if path in found or path.rpartition(".")[0] in whole]


def for_stacks(
    pattern_values: Mapping[str, N], stacks: Iterable[str], of_one: str = r"(?:\.\d+)?"
) -> dict[str, N]:
    """`rank_pattern` or `alpha_pattern` in which the keys that match a stack of experts match its matrices too.

    `of_one` is what may follow the path of a stack.
    """
    there = Paths(stacks)

    def reaches(key: str) -> bool:
        try:
            return not key.endswith(of_one) and there.any_by(key)
        except PatternError:
            return False  # which `check_patterns` reports

    return {
        f"(?:{key}){of_one}" if reaches(key) else key: value
        for key, value in pattern_values.items()
    }


def check_patterns(option: str, pattern_values: dict[str, float], paths: Iterable[str]) -> None:
    """Raise `TargetError` for a key that is no regular expression or selects none of `paths`."""
    there = Paths(paths)
    try:
        check_all(option, pattern_values)
        strange = [key for key in pattern_values if not there.any_by(key)]
    except PatternError as error:
        raise TargetError(f"{option}: {error}") from None
    if strange:
        raise TargetError(
            f"{option}: {strange[0]!r} matches none of the adapted modules; {_near(strange[0], there.paths)}"
        )


def select(
    model: nn.Module,
    targets: Targets,
    exclude: str | Sequence[str] = (),
    layer_indices: Sequence[int] | None = None,
    reserved: Iterable[str] = (),
    alone: bool = False,
) -> list[str]:
    """Paths of the modules to adapt, in the model's order.

    Args:
        targets: "all-linear" (every linear layer but the head and gates of one output), a pattern or a list of them (see
            `matching`), or a function of (path, module). "none" or [] adapts nothing, beside modules that are trained whole.
        exclude: patterns to leave out.
        layer_indices: only modules inside these repeated layers (the first number in the path); negative counts back.
        reserved: paths of modules that are trained whole; nothing inside them is adapted.
        alone: something else is trained, so that nothing need be adapted.

    Raises:
        TargetError: a pattern that matches nothing, or only modules that cannot be adapted.
    """
    patterns = [] if _is_function(targets) else _patterns(targets)
    means = {pattern: _means(model, pattern) for pattern in patterns}
    named_outright = {path for paths in means.values() for path in paths}
    modules = named_modules(
        model, named_outright | {path.rpartition(".")[0] for path in named_outright}
    )
    reserved = tuple(reserved)
    free = {path: m for path, m in modules.items() if path and not _inside(path, reserved)}
    named: set[str] = set()
    if _is_function(targets):
        chosen = [
            path
            for path, module in free.items()
            if layers.kind_of(module) and targets(path, module)  # type: ignore[operator, operator]
        ]
        described = "the targets function"
    else:
        if not patterns and (reserved or alone):
            return []
        if not patterns:
            raise TargetError("no targets given; name modules, or use targets='all-linear'")
        wanted: set[str] = set()
        for pattern in patterns:
            if pattern == ALL_LINEAR:
                wanted |= set(_all_linear(model, free))
            else:
                for meant in means[pattern]:
                    named |= set(_matching(meant, free, modules, reserved))
                _warn_of_strangers(pattern, modules)
        chosen = [path for path in free if path in wanted | named]
        described = ", ".join(patterns)
    for pattern in [exclude] if isinstance(exclude, str) else exclude or ():
        excluded = set(_matching_modules(pattern, modules))
        if not excluded:
            raise TargetError(f"exclude: {pattern!r} matches no module; {_near(pattern, free)}")
        chosen = [path for path in chosen if path not in excluded]
    if layer_indices is not None:
        chosen = _in_layers(chosen, layer_indices)
    for path in chosen:
        if path in named and (reason := layers.refusal(free[path])):
            raise TargetError(
                f"{path} cannot be adapted: it is {reason}. Leave it out with exclude={path!r}"
            )
    chosen = _without_refused(chosen, modules)
    if not chosen:
        kinds = sorted({type(m).__name__ for m in free.values() if layers.kind_of(m)})
        there = (
            f"its layers that can be adapted are of type {', '.join(kinds)}"
            if kinds
            else "it has none to adapt"
        )
        raise TargetError(f"{described} selects no layer of {type(model).__name__}; {there}")
    return chosen


def find_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules to train whole, selected by path or last parts of it.

    Raises:
        TargetError: a name that no module with parameters has.
    """
    modules = {path: m for path, m in named_modules(model).items() if path}
    found = []
    for name in names:
        paths = [p for p in modules if p == name or p.endswith("." + name)]
        if not paths:
            raise TargetError(
                f"modules_to_save: {name!r} matches no module; {_near(name, modules)}"
            )
        if not any(True for p in paths for _ in modules[p].parameters()):
            raise TargetError(f"modules_to_save: {name!r} has no parameters to train")
        for path in paths:
            if layers.is_container(modules[path]):
                raise TargetError(
                    f"modules_to_save: {path} cannot be trained whole: it is a "
                    f"{type(modules[path]).__name__}, which is never called itself; name the modules in it"
                )
            if any(quantised.is_quantised(part) for part in modules[path].modules()):
                raise TargetError(
                    f"modules_to_save: {path} cannot be trained whole: it is quantised. Adapt it, or load the model with it "
                    "left out (bitsandbytes: llm_int8_skip_modules; torchao: modules_to_not_convert)"
                )
        found += [p for p in paths if p not in found]
    return [
        path
        for path in modules
        if path in found and not _inside(path, [other for other in found if other != path])
    ]


def head_of(model: nn.Module) -> list[str]:
    """Paths of the model's head: what a transformers model holds outside its `base_model`, and its output embeddings."""
    paths = []
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(module) for module in base.modules()}
        paths = [
            path for path, module in model.named_modules() if path and id(module) not in inside
        ]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    paths += [path for path, module in model.named_modules() if module is output]
    skip = ours(model)
    own = (p for p in paths if not f"{p}.".startswith(skip))
    return [
        path
        for path in dict.fromkeys(own)
        if any(True for _ in model.get_submodule(path).parameters())
    ]


def new_heads(model: nn.Module, reached: Iterable[str]) -> list[str]:
    """Paths of a task's head that looks as it was made, not trained, and that no adapter at `reached` is in.

    A linear layer is made with a bias of zeros; of one without a bias nobody can tell. The output
    embedding of a language model is no such head: it comes with the model.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return []
    reached = tuple(reached)
    heads = [path for path in head_of(model) if not layers.is_container(model.get_submodule(path))]
    heads = [
        path for path in heads if not _inside(path, [other for other in heads if other != path])
    ]
    new = []
    for path in heads:
        linear = [m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear)]
        biases = [m.bias for m in linear if m.bias is not None and not m.bias.is_meta]
        touched = any(_inside(path, [one]) or _inside(one, [path]) for one in reached)
        if linear and not touched and not any(bool(bias.any()) for bias in biases):
            new.append(path)
    return new


def parse_layers(text: str) -> list[int]:
    """Layer indices from text such as "0-3,8,-1".

    Raises:
        SettingError: the text has another form.
    """
    indices: dict[int, None] = {}
    for part in text.split(",", 1000):
        if not (match := re.fullmatch(r"\s*(-?[0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)):
            raise SettingError(f"layers must look like 0-3,8,-1, not {text[:80]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= first + MOST_LAYERS:
            raise SettingError(
                f"layers {part.strip()!r} are more than {MOST_LAYERS:,}, which no model has"
            )
        indices |= dict.fromkeys(range(first, last + 1))
    return list(indices)


def _all_linear(model: nn.Module, free: dict[str, nn.Module]) -> list[str]:
    head = head_of(model)
    return [
        path
        for path, m in free.items()
        if layers.is_linear(m) and not layers.is_gate(m) and not _inside(path, head)
    ]


def _is_function(targets: object) -> bool:
    return callable(targets) and not isinstance(targets, type | nn.Module)


def _means(model: nn.Module, pattern: str) -> list[str]:
    """What a pattern means: itself, where it selects modules, and the parameters of attentions among these.

    Otherwise parameters by their paths, and layers, whose weights they are.
    """
    modules = {path: module for path, module in named_modules(model).items() if path}
    if pattern == ALL_LINEAR or (found := _matching_modules(pattern, modules)):
        return [pattern, *(parameters.parts_of(found, modules) if pattern != ALL_LINEAR else ())]
    held = parameters.parameters(model)
    if not (named := matching(pattern, held)):
        stem, _, number = pattern.rpartition(".")
        if pattern in model._parameters:
            raise TargetError(
                f"target {pattern!r} is a parameter of the model itself, whose class would have to change"
            )
        unlisted = [path for path in held if f"{path}.0" not in modules]
        named = (
            [f"{path}.{number}" for path in matching(stem, unlisted)] if number.isdigit() else []
        )
    return parameters.meant(model, pattern, named) or [pattern]


def _patterns(targets: object) -> list[str]:
    """`targets` as a list of patterns; "all-linear" and "none" in any case."""
    several = isinstance(targets, Iterable) and not isinstance(targets, str)
    patterns = []
    for entry in targets if several else [] if targets is None else [targets]:  # type: ignore[attr-defined]
        if not isinstance(entry, str):
            raise TargetError(
                f"targets must be names, globs or regular expressions as text, or a function, not {entry!r}"
            )
        patterns.append(ALL_LINEAR if entry.lower() == ALL_LINEAR else entry)
    return [] if [pattern.lower() for pattern in patterns] == ["none"] else patterns


def _matching(
    pattern: str, free: dict[str, nn.Module], modules: dict[str, nn.Module], reserved: Iterable[str]
) -> list[str]:
    """Paths that `pattern` selects among the layers that can be adapted."""
    found = _matching_modules(pattern, free)
    usable = [path for path in found if layers.kind_of(free[path])]
    if usable:
        return usable
    if found:
        inside = [p for p in free if _inside(p, found) and layers.kind_of(free[p])]
        hint = f"; it holds {', '.join(dict.fromkeys(map(_name, inside)))}" if inside else ""
        reason = layers.refusal(free[found[0]])
        raise TargetError(f"target {pattern!r} selects {found[0]}, but that is {reason}{hint}")
    if whole := matching(pattern, reserved):
        raise TargetError(
            f"target {pattern!r} selects {whole[0]}, which modules_to_save already trains whole; leave out one"
        )
    stack, _, number = pattern.rpartition(".")
    if number.isdigit() and (
        ones := [
            p for p in _matching_modules(stack, free) if isinstance(free[p], experts.ExpertMatrix)
        ]
    ):
        highest = max(int(path.rpartition(".")[2]) for path in ones)
        raise TargetError(
            f"target {pattern!r} matches no module; {stack} holds the experts 0 to {highest}"
        )
    raise TargetError(
        f"target {pattern!r} matches no module; {_near(pattern, [p for p in free if layers.kind_of(free[p])])}"
    )


def _in_layers(paths: list[str], indices: Sequence[int]) -> list[str]:
    """Those of `paths` inside the layers of these numbers, counted in each stack of layers by itself.

    An encoder's and a decoder's layers, or a vision tower's and a language model's, are stacks of
    their own: -1 is the last of each.
    """
    named, bare = (
        r"(?:^|\.)[^.]*[^.\d][^.]*\.(\d+)(?:\.|$)",
        r"(?:^|\.)(\d+)(?:\.|$)",
    )  # layers.3, else a Sequential's 3
    found = {path: m for path in paths if (m := re.search(named, path) or re.search(bare, path))}
    places = {path: (path[: m.start(1)], int(m[1])) for path, m in found.items()}
    counts: dict[str, int] = {}
    for stack, number in places.values():
        counts[stack] = max(counts.get(stack, 0), number + 1)
    indices = [indices] if isinstance(indices, int) else list(indices)
    for index in indices:
        if not any(-count <= index < count for count in counts.values()):
            there = ", ".join(f"{stack}0 to {stack}{count - 1}" for stack, count in counts.items())
            raise TargetError(
                f"layers: there is no layer {index}; the selected modules lie in {there or 'no numbered layers'}"
            )

    def is_wanted(stack: str, number: int) -> bool:
        return any(
            number == index % counts[stack]
            for index in indices
            if -counts[stack] <= index < counts[stack]
        )

    return [path for path in paths if path in places and is_wanted(*places[path])]


def _without_refused(chosen: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """`chosen` without the layers that cannot be adapted, saying which and why."""
    refused = {path: reason for path in chosen if (reason := layers.refusal(modules[path]))}
    for path, reason in refused.items():
        warnings.warn(f"{path} is left out: it is {reason}", LorakinWarning, stacklevel=5)
    return [path for path in chosen if path not in refused]


def _warn_of_strangers(pattern: str, modules: Mapping[str, nn.Module]) -> None:
    """Say which words of a regular expression stand in no path of the model: what they name is not adapted.

    `gate_proj|up_proj|down_proj` finds the down_proj of experts alone whose gate and up are one parameter.
    """
    if re.fullmatch(r"[\w.*?-]*", pattern):  # a name or a glob
        return
    there = " ".join(modules)
    words = re.findall(r"[A-Za-z_]\w{2,}", re.sub(r"\\.|\[[^]]*\]|\(\?P<\w+>", " ", pattern))
    if strangers := [word for word in dict.fromkeys(words) if word not in there]:
        names = sorted({_name(path) for path in modules if path})
        near = {
            word: [name for name in names if word.split("_")[0] in name.split("_")]
            for word in strangers
        }
        found = [
            f"{word!r} (there is {', '.join(close)})" if close else repr(word)
            for word, close in near.items()
        ]
        warnings.warn(
            f"target {pattern!r} names {' and '.join(found)}, which no module has, so nothing there is adapted",
            LorakinWarning,
            stacklevel=5,
        )


def _inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _name(path: str) -> str:
    """The last part of a path that is no number."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def _near(pattern: str, paths: Iterable[str]) -> str:
    """A hint at the names most like `pattern`."""
    paths = list(paths)
    names = list(dict.fromkeys([p.rsplit(".", 1)[-1] for p in paths] + paths))
    close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.5)
    last_parts = list(dict.fromkeys(map(_name, paths)))
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"names there are: {', '.join(last_parts[:12])}{', …' if len(last_parts) > 12 else ''}"
