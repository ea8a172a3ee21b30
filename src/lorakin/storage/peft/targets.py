"""Which modules PEFT adapts for a config, and the check that a file has tensors for just those."""

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
"""Of several numbers in a path PEFT takes the first as the layer's, up to 0.19 it took the last."""


def check_targets(
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    slots: Collection[str],
    copies: Iterable[str],
    former: Mapping[str, list[str]],
    where: str,
) -> None:
    """Checks that every module that the config targets has its tensors, and the other way round.

    Args:
        modules: the model's modules by path.
        config: PEFT's config.
        slots: paths of the modules with tensors.
        copies: paths of the modules that are trained whole.
        former: path → its names in the file, which the config targets, where they are others. Such
            a config may mean fewer modules than it names in this model, so that missing ones are a
            warning; but all experts of a stack must be there.
        where: the file, for messages.

    Raises:
        AdapterError: the two differ.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    experts = {path for path, m in modules.items() if layer_kinds.kind_of(m) is ExpertLayer}
    # Experts are not targeted as modules.
    there = set(slots) - (experts - former.keys())
    whole = tuple(f"{path}." for path in copies)
    targetable = [
        path
        for path, module in modules.items()
        if path not in experts | former.keys()
        and layer_kinds.kind_of(module)
        and not f"{path}.".startswith(whole)
    ]
    meanings = []
    for meant in _readings(targets, config, modules.keys() - experts):
        paths = {path for path in targetable if meant.takes(path)}
        paths |= {path for path, names in former.items() if all(map(meant.takes, names))}
        absent = _absent_experts(modules, former, meant)
        if paths == there and not absent:
            return
        meanings.append((paths, absent))
    wanted, lacking = meanings[0]
    missing = lacking or sorted(wanted - set(slots))
    if lacking or (missing and not former):
        raise AdapterError(
            f"{where}: the config targets {some(missing)}, but the file has no tensors for it"
        )
    if missing:
        warnings.warn(
            f"{where}: it was made under another transformers, which named modules otherwise. By "
            f"today's names its config targets {some(missing)} too; these have no tensors in it "
            "and stay as they are",
            LorakinWarning,
            stacklevel=2,
        )
    if extra := sorted(there - wanted):
        raise AdapterError(
            f"{where}: the file has tensors for {some(extra)}, which the config does not target"
        )


def _absent_experts(
    modules: Mapping[str, nn.Module], former: Mapping[str, list[str]], meant: Reading
) -> list[str]:
    """Names of experts that the config targets, and others of whose stack the file has."""
    there, wanted, seen = (
        {name for names in former.values() for name in names},
        set[str](),
        set[tuple[str, str, str]](),
    )
    for path, names in former.items():
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
                wanted |= {f"{start}.{n}.{end}" for n in numbers}
    return sorted(name for name in wanted - there if meant.takes(name))


class Reading:
    """One way to understand a config's targets.

    A string is a regular expression for the whole path; a list holds paths and ends of paths.
    Layers narrow what is found by the end of its path, not what is named whole.
    """

    def __init__(
        self,
        targets: str | list[str],
        config: Mapping[str, Any],
        known: Collection[str],
        which: int,
    ) -> None:
        """An entry among the paths `known` means that path alone. `which`: `FIRST` or `LAST`."""
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

    In lorakin's files an entry that is a module's whole path means that module alone. To PEFT it is
    the end of other modules' paths too.
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
