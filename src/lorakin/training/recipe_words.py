"""A field of `Recipe` in words: its option, its default, its choices, and what texts mean for it.

The command line and the page (`lorakin ui`) make their options and forms from it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakin.errors import SettingError
from lorakin.training.formats import NAMES
from lorakin.training.recipe import Recipe, field_value, kinds, option_of
from lorakin.training.recipe_option import PANELS
from lorakin.training.recipe_values import plain

TEMPLATE = "chat_template"
PANEL_OF = {name: option.panel for name in kinds() if (option := option_of(name)) is not None}
ALL_FIELDS = tuple(sorted(PANEL_OF, key=lambda name: PANELS.index(PANEL_OF[name])))
"""The fields of `Recipe` that the command line offers, group by group."""


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


def choices_of(name: str) -> list[str]:
    """Returns the words that a field may be, none if there are many.

    >>> choices_of("keep")
    ['last', 'best']
    """
    kind = plain(kinds()[name])
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return list(NAMES) if name == "format" else []


def default_in_words(name: str) -> str:
    """Returns a field's default as help texts say it; "" if there is none.

    >>> default_in_words("batch_size"), default_in_words("steps")
    ('8', 'one epoch')
    """
    option = option_of(name)
    assert option is not None, name
    value = None if name in (TEMPLATE, "model", "data", "out") else defaults(name)[name]
    default = option.default
    if default is None and value not in (None, [], {}):
        if isinstance(value, bool):
            default = "yes" if value else "no"
        else:
            default = ",".join(value) if isinstance(value, list) else f"{value}"
        default = default.removesuffix(".0")
    return default or ""


def given_fields(names: Sequence[str], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that the user gave, as `Recipe` takes them.

    >>> given_fields(["rank", "targets"], {"rank": "8", "targets": ["q_proj,v_proj"]})
    {'rank': 8, 'targets': ['q_proj', 'v_proj']}

    Args:
        names: the fields.
        raw: name → a value, a text or a list of texts, None if it was not given; `no_NAME` is
            true where the user said no to a field.

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
                flag = option_name(name)
                raise SettingError(f"{flag} and --no-{flag[2:]} contradict each other; give one")
            value = False
        elif not value and isinstance(value, list | None):
            continue
        elif name in READERS:
            value = READERS[name](value)
        elif name == "columns":
            value = parse_columns(value)
        elif isinstance(value, list):
            value = parse_settings(value, option_name(name))
        fields[name] = value if value is False else field_value(name, value, option_name(name))
    return fields


def option_name(name: str) -> str:
    """Returns a field's option as messages call it.

    >>> option_name("max_rows"), option_name("chat_template"), option_name("settings")
    ('--max-rows', '--chat-template', '--set')
    """
    option = option_of(name)
    return option.names[0] if option and option.names else "--" + name.replace("_", "-")
