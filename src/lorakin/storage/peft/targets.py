"""Which modules PEFT adapts for a config: its rules, and the check that a file has tensors for just those."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lorakin.errors import AdapterError, LorakinWarning, some
from lorakin.inject import layers
from lorakin.inject.layers import ExpertLayer
from lorakin.inject.patterns import matches

FIRST, LAST = 1, -1
"""Of several numbers in a path PEFT takes the first as the layer's, up to 0.19 it took the last."""


def check_targets(
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    sites: Collection[str],
    copies: Iterable[str],
    former: Mapping[str, list[str]],
    where: str,
) -> None:
    """See that every module that the config targets has its tensors, and the other way round.

    `former`: path → its names in the file, which the config targets, where it has others there. In such a file the config may
    mean fewer modules than it names in this model, so what is missing is said and left alone; of experts all must be there.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    experts = {
        path for path, module in modules.items() if layers.kind_of(module) is ExpertLayer
    }  # not targeted as modules
    whole = list(copies)
    targetable = [
        path
        for path, module in modules.items()
        if path not in experts and layers.kind_of(module)
        if not any(path == copy or path.startswith(copy + ".") for copy in whole)
    ]
    known = modules.keys() - experts
    wanted: set[str] | None = None
    lacking: list[str] | None = None
    for meant in _readings(targets, config, known):
        paths = {path for path in targetable if path not in former and meant.takes(path)}
        paths |= {path for path, names in former.items() if all(map(meant.takes, names))}
        absent = _absent_experts(modules, former, meant)
        if paths == set(sites) - (experts - former.keys()) and not absent:
            return
        wanted = paths if wanted is None else wanted
        lacking = absent if lacking is None else lacking
    assert wanted is not None
    missing = lacking or sorted(wanted - set(sites))
    if lacking or (missing and not former):
        raise AdapterError(
            f"{where}: the config targets {some(missing)}, but the file has no tensors for it"
        )
    if missing:
        warnings.warn(
            f"{where}: the file is of another transformers, which named modules otherwise; its config targets {some(missing)} "
            "by today's names, which have no tensors in it and stay as they are",
            LorakinWarning,
            stacklevel=2,
        )
    if extra := sorted(set(sites) - wanted - (experts - former.keys())):
        raise AdapterError(
            f"{where}: the file has tensors for {some(extra)}, which the config does not target"
        )


def _absent_experts(
    modules: Mapping[str, nn.Module], former: Mapping[str, list[str]], meant: Reading
) -> list[str]:
    """Names of experts that the config targets as it does others of their stack, and that the file lacks."""
    there, wanted, seen = (
        {name for names in former.values() for name in names},
        set[str](),
        set[tuple[str, str, str]](),
    )
    for path, names in former.items():
        stack, _, number = path.rpartition(".")
        if layers.kind_of(modules[path]) is not ExpertLayer:
            continue
        for name in names:
            start, _, end = name.rpartition(f".{number}.")
            if start and (stack, start, end) not in seen:
                seen.add((stack, start, end))
                numbers = itertools.takewhile(
                    lambda n, stack=stack: f"{stack}.{n}" in modules,  # type: ignore[misc]
                    itertools.count(),
                )
                wanted |= {f"{start}.{n}.{end}" for n in numbers}
    return sorted(name for name in wanted - there if meant.takes(name))


class Reading:
    """One way to understand a config's targets.

    A string is a regular expression for the whole path; a list holds paths and ends of paths. Layers narrow what is found by
    the end of its path, not what is named whole.
    """

    def __init__(
        self,
        targets: str | list[str],
        config: Mapping[str, Any],
        known: Collection[str],
        which: int,
    ) -> None:
        """`known`: an entry that is one of these paths means that one alone. `which`: `FIRST` or `LAST`."""
        self.targets = targets if isinstance(targets, str) else frozenset(targets)
        self.excluded = config.get("exclude_modules") or ()
        self.known = known
        numbers = config.get("layers_to_transform")
        self.numbers = {numbers} if isinstance(numbers, int) else set(numbers or ())
        names = config.get("layers_pattern") or []
        names = [names] if isinstance(names, str) else names
        self.before = [rf"(?:.*\.)?(?:{name})" for name in names] or [r".*\.[^.]*"]
        self.which = which

    def takes(self, path: str) -> bool:
        """Whether the module at this path is adapted."""
        if self.excluded and _matches(self.excluded, path):
            return False
        if isinstance(self.targets, str) or path in self.targets:
            return _matches(self.targets, path)
        return _ends_in(self.targets, path, self.known) and (
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


def _readings(
    targets: str | list[str], config: Mapping[str, Any], known: Collection[str]
) -> Iterator[Reading]:
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
        return matches(targets, path)
    return path in targets or _ends_in(targets, path, ())


def _ends_in(entries: Collection[str], path: str, known: Collection[str]) -> bool:
    parts = path.split(".")
    return any(
        (end := ".".join(parts[n:])) in entries and end not in known for n in range(1, len(parts))
    )
