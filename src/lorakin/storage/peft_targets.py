"""Which modules PEFT adapts for a config: its rules, and the check that a file has tensors for just those."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lorakin.errors import AdapterError, some
from lorakin.surgery import layers
from lorakin.surgery.layers import ExpertLayer

FIRST, LAST = r".*?", r".*"
"""Before a layer's number: of several numbers in a path PEFT takes the first, up to 0.19 it took the last."""


def check_targets(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], sites: Collection[str], copies: Iterable[str], where: str
) -> None:
    """See that every module that the config targets has its tensors, and the other way round."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    experts = {path for path, module in modules.items() if layers.kind_of(module) is ExpertLayer}  # not targeted as modules
    whole = list(copies)
    targetable = [
        path
        for path, module in modules.items()
        if path not in experts and layers.kind_of(module)
        if not any(path == copy or path.startswith(copy + ".") for copy in whole)
    ]
    known = modules.keys() - experts
    wanted: set[str] | None = None
    for meant in _readings(targets, config, known):
        paths = {path for path in targetable if meant.takes(path)}
        if paths == set(sites) - experts:
            return
        wanted = paths if wanted is None else wanted
    assert wanted is not None
    if missing := sorted(wanted - set(sites)):
        raise AdapterError(f"{where}: the config targets {some(missing)}, but the file has no tensors for it")
    extra = sorted(set(sites) - wanted - experts)
    raise AdapterError(f"{where}: the file has tensors for {some(extra)}, which the config does not target")


class Reading:
    """One way to understand a config's targets.

    A string is a regular expression for the whole path; a list holds paths and ends of paths. Layers narrow what is found by
    the end of its path, not what is named whole.
    """

    def __init__(self, targets: str | list[str], config: Mapping[str, Any], known: Collection[str], before: str) -> None:
        """`known`: an entry that is one of these paths means that one alone. `before`: what stands before a layer's number."""
        self.targets = targets if isinstance(targets, str) else frozenset(targets)
        self.excluded = config.get("exclude_modules") or ()
        self.known = known
        numbers = config.get("layers_to_transform")
        self.numbers = {numbers} if isinstance(numbers, int) else set(numbers or ())
        names = config.get("layers_pattern") or []
        names = [names] if isinstance(names, str) else names
        self.layer = [rf"(?:^|{before}\.){name}\.(\d+)\." for name in names] or [rf"{before}\.[^.]*\.(\d+)\."]

    def takes(self, path: str) -> bool:
        """Whether the module at this path is adapted."""
        if self.excluded and _matches(self.excluded, path):
            return False
        if isinstance(self.targets, str) or path in self.targets:
            return _matches(self.targets, path)
        return _ends_in(self.targets, path, self.known) and (not self.numbers or self._layer_of(path) in self.numbers)

    def _layer_of(self, path: str) -> int | None:
        found = (re.match(rule, path) for rule in self.layer)
        return next((int(match[1]) for match in found if match), None)


def _readings(targets: str | list[str], config: Mapping[str, Any], known: Collection[str]) -> Iterator[Reading]:
    """The ways in which a config may be meant, the likeliest first.

    In our files an entry that is a module's whole path means that module; to PEFT it is also the end of others' paths.
    """
    yield Reading(targets, config, known, FIRST)
    if not isinstance(targets, str):
        yield Reading(targets, config, (), FIRST)
        if config.get("layers_to_transform"):
            yield Reading(targets, config, (), LAST)


def _matches(targets: str | Collection[str], path: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return path in targets or _ends_in(targets, path, ())


def _ends_in(entries: Collection[str], path: str, known: Collection[str]) -> bool:
    parts = path.split(".")
    return any((end := ".".join(parts[n:])) in entries and end not in known for n in range(1, len(parts)))
