"""Options of the command line that are made from the fields of `Recipe`.

A command asks for the fields that it takes, and gets what the user gave as `**flags`:

    @recipe_options("columns", "quantize")
    def command(model: Model, *, as_json: Json = False, **flags: Any) -> None: ...

Each option has the name, the type, the help and the default of the field.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from lorakin.training.recipe import kinds, option_of
from lorakin.training.recipe_option import Option
from lorakin.training.recipe_values import plain
from lorakin.training.recipe_words import (
    READERS,
    TEMPLATE,
    choices_of,
    default_in_words,
    given_fields,
)


def recipe_options(
    *names: str, grouped: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a decorator that gives a command an option for each of these fields of `Recipe`.

    The options stand after the command's positional parameters and before its keyword-only ones.
    The command gets, as keywords, the fields that the user gave, in the form that `Recipe` takes.

    Args:
        names: the fields.
        grouped: whether `--help` lists them in groups (`Option.panel`).
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(command, eval_str=True).parameters.values()
        added = [parameter for name in names for parameter in _parameters(name, grouped)]

        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            raw = {parameter.name: given.pop(parameter.name) for parameter in added}
            command(**given, **given_fields(names, raw))

        parameters = [
            *(p for p in declared if p.kind is p.POSITIONAL_OR_KEYWORD),
            *added,
            *(p for p in declared if p.kind is p.KEYWORD_ONLY),
        ]
        keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters]
        wrapped.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in keywords}
        return wrapped

    return decorate


def _parameters(name: str, grouped: bool) -> Iterator[inspect.Parameter]:
    option = option_of(name)
    assert option is not None, name
    panel = option.panel if grouped else None
    kind: Any = plain(kinds()[name])
    flag = "--" + name.replace("_", "-")
    flags = list(option.names or [flag])
    if name == TEMPLATE or kind is bool:
        kind = str if name == TEMPLATE else bool
    elif name in READERS or typing.get_origin(kind) is dict:
        kind = list[str]
    elif typing.get_origin(kind) is typing.Literal:
        kind = str  # `Recipe` refuses other words
    words = choices_of(name)
    typer_option = typer.Option(
        *flags,
        help=_help(name, option),
        show_default=False,
        rich_help_panel=panel,
        autocompletion=(lambda: words) if words else None,
    )
    yield _parameter(name, kind | None, typer_option, None)
    if name == TEMPLATE or kind is bool:
        yield _no(name, panel)


def _no(name: str, panel: str | None) -> inspect.Parameter:
    """Returns the option that says no to a field.

    `--help` leaves most of them out: they are there to say no to what a recipe says.
    """
    flag = "--no-" + name.replace("_", "-")
    is_template = name == TEMPLATE
    said = "Write prompts without a chat template." if is_template else f"Not --{flag[5:]}."
    option = typer.Option(flag, help=said, rich_help_panel=panel, hidden=not is_template)
    return _parameter(f"no_{name}", bool, option, False)


def _parameter(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _help(name: str, option: Option) -> str:
    default = default_in_words(name)
    return f"{option.help} \\[default: {default}]".strip() if default else option.help
