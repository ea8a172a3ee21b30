"""Checks that a file has tensors for exactly the modules that PEFT adapts for its config."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lorakin.errors import AdapterError, LorakinWarning, some
from lorakin.inject import layer_kinds
from lorakin.inject.layer_kinds import ExpertLayer
from lorakin.inject.patterns import matches

FIRST, LAST = 1, -1
"""Of several numbers in a path PEFT takes the first as the layer's; up to 0.19 it took the last."""


def check_targets(
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    slots: Collection[str],
    whole_modules: Iterable[str],
    old_paths: Mapping[str, list[str]],
    where: str,
) -> None:
    """Checks that every module that the config targets has its tensors, and the other way round.

    Args:
        modules: the model's modules by path.
        config: PEFT's config.
        slots: paths of the modules with tensors.
        whole_modules: paths of the modules that are trained whole.
        old_paths: path → its names in the file, which the config targets, if these are others. The
            config was then meant for fewer modules than it names in this model, so missing ones
            are only a warning; but all experts of a stack must be in the file.
        where: the file, for messages.

    Raises:
        AdapterError: the two differ.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    experts = {path for path, m in modules.items() if layer_kinds.kind_of(m) is ExpertLayer}
    # Experts are not targeted as modules.
    in_file = set(slots) - (experts - old_paths.keys())
    inside_whole_modules = tuple(f"{path}." for path in whole_modules)
    targetable = [
        path
        for path, module in modules.items()
        if path not in experts | old_paths.keys()
        and layer_kinds.kind_of(module)
        and not f"{path}.".startswith(inside_whole_modules)
    ]
    results = []
    for interpretation in _interpretations(targets, config, modules.keys() - experts):
        paths = {path for path in targetable if interpretation.takes(path)}
        paths |= {
            path for path, names in old_paths.items() if all(map(interpretation.takes, names))
        }
        absent = _absent_experts(modules, old_paths, interpretation)
        if paths == in_file and not absent:
            return
        results.append((paths, absent))
    # The error is about the likeliest interpretation.
    targeted, lacking = results[0]
    missing = lacking or sorted(targeted - set(slots))
    if lacking or (missing and not old_paths):
        raise AdapterError(
            f"{where}: the config targets {some(missing)}, but the file has no tensors for it"
        )
    if missing:
        warnings.warn(
            f"{where}: it was made with another version of transformers, in which modules had "
            f"other names. By today's names its config also targets {some(missing)}; these have no "
            "tensors in the file and are not adapted",
            LorakinWarning,
            stacklevel=2,
        )
    if extra := sorted(in_file - targeted):
        raise AdapterError(
            f"{where}: the file has tensors for {some(extra)}, which the config does not target"
        )


def _absent_experts(
    modules: Mapping[str, nn.Module],
    old_paths: Mapping[str, list[str]],
    interpretation: Interpretation,
) -> list[str]:
    """Returns experts that the config targets and the file lacks, though it has their stack.

    They are named as in the file.
    """
    in_file = {name for names in old_paths.values() for name in names}
    experts, seen = set[str](), set[tuple[str, str, str]]()
    for path, names in old_paths.items():
        stack, _, number = path.rpartition(".")
        if layer_kinds.kind_of(modules[path]) is not ExpertLayer:
            continue
        for name in names:
            start, _, end = name.rpartition(f".{number}.")
            if start and (stack, start, end) not in seen:
                seen.add((stack, start, end))
                numbers = itertools.takewhile(
                    lambda n, stack=stack: f"{stack}.{n}" in modules,  # type: ignore[misc]
                    itertools.count(),
                )
                experts |= {f"{start}.{n}.{end}" for n in numbers}
    return sorted(name for name in experts - in_file if interpretation.takes(name))


class Interpretation:
    """One way to interpret a config's targets.

    A string is a regular expression for the whole path; a list holds paths and ends of paths. The
    layers (`layers_to_transform`) restrict what an end of a path selects, not what a path selects.
    """

    def __init__(
        self,
        targets: str | list[str],
        config: Mapping[str, Any],
        whole_paths: Collection[str],
        which: int,
    ) -> None:
        """Makes an interpretation.

        Args:
            targets: the config's targets.
            config: the config.
            whole_paths: paths; an entry that is one of them selects that path alone.
            which: `FIRST` or `LAST`.
        """
        self.targets = targets if isinstance(targets, str) else frozenset(targets)
        self.excluded = config.get("exclude_modules") or ()
        self.whole_paths = whole_paths
        numbers = config.get("layers_to_transform")
        self.numbers = {numbers} if isinstance(numbers, int) else set(numbers or ())
        names = config.get("layers_pattern") or []
        names = [names] if isinstance(names, str) else names
        self.before = [rf"(?:.*\.)?(?:{name})" for name in names] or [r".*\.[^.]*"]
        self.which = which

    def takes(self, path: str) -> bool:
        """Returns whether the module at this path is adapted."""
        if self.excluded and _matches(self.excluded, path):
            return False
        if isinstance(self.targets, str) or path in self.targets:
            return _matches(self.targets, path)
        return _ends_in(self.targets, path, self.whole_paths) and (
            not self.numbers or self._layer_of(path) in self.numbers
        )

    def _layer_of(self, path: str) -> int | None:
        parts = path.split(".")
        inner = [n for n, part in enumerate(parts[:-1]) if re.fullmatch("[0-9]{1,9}", part)]
        for rule in self.before:
            for n in inner[:: self.which]:
                if matches(rule, ".".join(parts[:n])):
                    return int(parts[n])
        return None


def _interpretations(
    targets: str | list[str], config: Mapping[str, Any], whole_paths: Collection[str]
) -> Iterator[Interpretation]:
    """Yields the ways to interpret a config, the likeliest first.

    In lorakin's files an entry that is a module's whole path means that module alone. For PEFT it
    is also the end of other modules' paths.
    """
    yield Interpretation(targets, config, whole_paths, FIRST)
    if not isinstance(targets, str):
        yield Interpretation(targets, config, (), FIRST)
        if config.get("layers_to_transform"):
            yield Interpretation(targets, config, (), LAST)


def _matches(targets: str | Collection[str], path: str) -> bool:
    if isinstance(targets, str):
        return matches(targets, path)
    return path in targets or _ends_in(targets, path, ())


def _ends_in(entries: Collection[str], path: str, whole_paths: Collection[str]) -> bool:
    parts = path.split(".")
    return any(
        (end := ".".join(parts[n:])) in entries and end not in whole_paths
        for n in range(1, len(parts))
    )
