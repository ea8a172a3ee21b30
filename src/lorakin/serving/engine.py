"""What a program that serves models is: its command, and what it cannot serve."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorakin.serving.traits import Traits

ADAPTER, MERGED = "adapter", "merged"
"""The two ways to serve: an adapter beside the base, and a model that it is merged into."""
BASE = "base"
"""The name under which the base is served."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """Something that an engine cannot serve.

    Attributes:
        applies: whether an adapter has it.
        reason: why it cannot be served.
        ways: how it cannot be served: beside the base, merged, or neither way.
    """

    applies: Callable[[Traits], bool]
    reason: str
    ways: tuple[str, ...] = (ADAPTER,)


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a command is made of.

    Attributes:
        base: the base, as the engine loads it; None if all is merged.
        models: name → path of an adapter or a merged model, from the directory it is started in.
        way: `ADAPTER` or `MERGED`.
        rank: the largest rank of the adapters as they were exported.
        host, port: where the server listens.
        template: the file of a chat template in place of the base's.
    """

    base: str | None
    models: Mapping[str, str]
    way: str
    rank: int
    host: str
    port: int
    template: str | None = None

    @property
    def only(self) -> str:
        """The name of the only model."""
        (name,) = self.models
        return name


@dataclasses.dataclass(frozen=True)
class Engine:
    """A program that serves models.

    Attributes:
        name: the word after --engine.
        targets: way → what `lorakin export --to` writes for it; in the order of preference.
        port: where it listens by default.
        limits: what it cannot serve.
        several: the ways in which one server has several adapters.
        command: the words of the command that serves.
        asking: how a request names a model, in words.
        program: the command's first word, or a module of Python.
        modules: modules of Python that must be installed.
        install: how to get it.
        afterwards: commands to run once the server answers.
        environment: variables of the server's environment.
    """

    name: str
    targets: Mapping[str, str]
    port: int
    limits: tuple[Limit, ...]
    several: tuple[str, ...]
    command: Callable[[Launch], list[str]]
    asking: Callable[[Launch], str]
    program: str
    install: str
    modules: tuple[str, ...] = ()
    afterwards: Callable[[Launch], list[list[str]]] = lambda launch: []
    environment: Callable[[Launch], dict[str, str]] = lambda launch: {}

    def refusals(self, traits: Traits, way: str) -> list[str]:
        """Returns why the engine cannot serve such an adapter in this way; [] if it can."""
        return [
            limit.reason for limit in self.limits if way in limit.ways and limit.applies(traits)
        ]

    def ways(self, traits: Traits) -> list[str]:
        """Returns the ways in which it serves such an adapter, the best first."""
        return [way for way in self.targets if not self.refusals(traits, way)]

    def located(self) -> list[str] | None:
        """Returns the words that start the program here; None if it is not installed."""
        if any(importlib.util.find_spec(module) is None for module in self.modules):
            return None
        if self.program.startswith("python -m "):
            return [sys.executable, "-m", self.program.rpartition(" ")[2]]
        beside = Path(sys.executable).parent / self.program
        found = str(beside) if self.modules and beside.is_file() else shutil.which(self.program)
        return None if found is None else [found]


def table(all_traits: Mapping[str, Traits], engines: Sequence[Engine]) -> list[dict[str, object]]:
    """Returns how each engine serves each adapter, or why it does not.

    Args:
        all_traits: name → what the adapter holds.
        engines: the engines, in the order of the rows.
    """
    rows: list[dict[str, object]] = []
    for engine in engines:
        for name, traits in all_traits.items():
            ways = engine.ways(traits)
            beside = ways[:1] == [ADAPTER]
            reasons = [] if beside else engine.refusals(traits, ADAPTER if ways else MERGED)
            rows.append(
                {
                    "engine": engine.name,
                    "adapter": name,
                    "served": ways[0] if ways else "no",
                    "several": bool(ways) and ways[0] in engine.several,
                    "reasons": reasons,
                }
            )
    return rows
