"""`--quiet` and `--verbose`, which every command has, before its name or after it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lorakin.errors import SettingError
from lorakin.library_logs import let_libraries_log
from lorakin.terminal import Terminal
from lorakin.waiting import show_on

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show only results, warnings and errors.")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Show also what the libraries log, and where an error came from."
    ),
]


@dataclasses.dataclass
class Verbosity:
    """What the user asked for."""

    quiet: bool = False
    verbose: bool = False

    def ask(self, quiet: bool, verbose: bool) -> None:
        """Takes what was said before the command's name, and after it.

        Raises:
            SettingError: both.
        """
        self.quiet |= quiet
        self.verbose |= verbose
        if self.quiet and self.verbose:
            self.verbose = False
            raise SettingError("--quiet and --verbose contradict each other; give one")
        if verbose:
            let_libraries_log()


chosen = Verbosity()
"""What the user asked for in this run of the command."""


def is_first() -> bool:
    """Returns whether this process is the first of several, or the only one: it alone prints."""
    return os.environ.get("RANK", "0") == "0"


def messages_on(as_json: bool) -> Terminal:
    """Returns the console for what is said on the way to a result; with `--quiet` it is silent."""
    for_warnings = Terminal(stderr=True) if chosen.quiet else None
    return Terminal(stderr=as_json, quiet=chosen.quiet, for_warnings=for_warnings)


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command that also has `--quiet` and `--verbose`."""
    declared = inspect.signature(command, eval_str=True).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]

    @functools.wraps(command)
    def wrapped(*, quiet: bool, verbose: bool, **given: Any) -> None:
        chosen.ask(quiet, verbose)
        with show_on(None if chosen.quiet or not is_first() else Terminal(stderr=True)):
            command(**given)

    parameters = [*(p.replace(kind=keyword) for p in declared), *added]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped
