"""`--quiet` and `--verbose`, which every command has, before its name or after it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lorakin.errors import SettingError
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

CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree", "DeepSpeed")
"""Libraries that warn of every cast of every layer, or of what they cannot load on import."""


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
            _let_libraries_log()


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


def calm_libraries() -> None:
    """Keeps libraries from logging what no user can act on; undoes `_let_libraries_log`."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
        # One of them sets its level again, and writes to stdout, where results go.
        logging.getLogger(name).addFilter(_is_serious)


def _let_libraries_log() -> None:
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).removeFilter(_is_serious)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"  # it is read when transformers is imported


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
