"""Options of the command line that are made from the fields of `Recipe`.

A command asks for the fields that it takes, and gets what the user gave as `**flags`:

    @recipe_options("columns", "quantize")
    def command(model: Model, *, as_json: Json = False, **flags: Any) -> None: ...

Each option has the name, the type, the help and the default of the field.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from lorakin.errors import SettingError
from lorakin.training.formats import NAMES
from lorakin.training.recipe import Recipe, field_value, kinds, option_of
from lorakin.training.recipe_option import PANELS, Option
from lorakin.training.recipe_values import plain

TEMPLATE = "chat_template"
PANEL_OF = {name: option.panel for name in kinds() if (option := option_of(name)) is not None}
ALL_FIELDS = tuple(sorted(PANEL_OF, key=lambda name: PANELS.index(PANEL_OF[name])))
"""The fields of `Recipe` that the command line offers, group by group."""


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
            command(**given, **_fields(names, raw))

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


def defaults(*names: str) -> dict[str, Any]:
    """Returns the defaults of these fields of `Recipe`.

    >>> defaults("batch_size", "targets")
    {'batch_size': 8, 'targets': ['all-linear']}
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    factories = {name: fields[name].default_factory for name in names}
    return {
        name: fields[name].default if factory is dataclasses.MISSING else factory()
        for name, factory in factories.items()
    }


def split_names(texts: Sequence[str]) -> list[str]:
    """Returns the names in texts with commas; a regular expression with braces is not split.

    >>> split_names(["q_proj,v_proj", "layers.[0-9]{1,2}"])
    ['q_proj', 'v_proj', 'layers.[0-9]{1,2}']
    """
    lists = ([text] if "{" in text else text.split(",") for text in texts)
    return [name.strip() for names in lists for name in names if name.strip()]


READERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "data": list,
    "method": ",".join,
    "targets": split_names,
    "exclude": split_names,
    "modules_to_save": split_names,
    "trainable_tokens": split_names,
    "report_to": split_names,
    "data_weights": split_names,
}
"""Fields whose options may be given several times → the function from the texts to the value."""


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
    words = _words(name)
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


def _words(name: str) -> list[str]:
    """Returns the words that a field may be, for the shell to complete; none if there are many."""
    kind = plain(kinds()[name])
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return list(NAMES) if name == "format" else []


def _parameter(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=annotation)


def _help(name: str, option: Option) -> str:
    value = None if name in (TEMPLATE, "model", "data", "out") else defaults(name)[name]
    default = option.default
    if default is None and value not in (None, [], {}):
        if isinstance(value, bool):
            default = "yes" if value else "no"
        else:
            default = ",".join(value) if isinstance(value, list) else f"{value}"
        default = default.removesuffix(".0")
    return f"{option.help} \\[default: {default}]".strip() if default else option.help


def _fields(names: Sequence[str], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the user gave, as `Recipe` takes them.

    Raises:
        SettingError: a text is not NAME=VALUE, an option and its --no- are given, or a value does
            not fit the field.
    """
    from lorakin.training.yaml_values import parse_columns, parse_settings

    fields: dict[str, Any] = {}
    for name in names:
        value = raw[name]
        if raw.get(f"no_{name}"):
            if value is not None:
                flag = _called(name)
                raise SettingError(f"{flag} and --no-{flag[2:]} contradict each other; give one")
            value = False
        elif not value and isinstance(value, list | None):
            continue
        elif name in READERS:
            value = READERS[name](value)
        elif name == "columns":
            value = parse_columns(value)
        elif isinstance(value, list):
            value = parse_settings(value, _called(name))
        fields[name] = value if value is False else field_value(name, value, _called(name))
    return fields


def _called(name: str) -> str:
    """Returns a field's option as messages call it.

    >>> _called("max_rows"), _called("chat_template"), _called("settings")
    ('--max-rows', '--chat-template', '--set')
    """
    option = option_of(name)
    return option.names[0] if option and option.names else "--" + name.replace("_", "-")
