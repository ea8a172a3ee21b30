"""A form made of fields of `Recipe`, and what its values stand for: words, a recipe, YAML."""

from __future__ import annotations

import shlex
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lorakin.errors import SettingError
from lorakin.training.recipe import kinds, option_of
from lorakin.training.recipe_values import plain
from lorakin.training.recipe_words import (
    PANEL_OF,
    READERS,
    TEMPLATE,
    choices_of,
    default_in_words,
    defaults,
    given_fields,
    option_name,
)
from lorakin.ui import warm

METHOD = "method"
NO_TEMPLATE = "none"
"""What the user types to write prompts without a chat template."""
ONE_A_LINE = ("data",)
"""Fields whose texts stand one a line, for a path may hold blanks."""


def input_of(name: str, **options: Any) -> Any:
    """Returns the component in which a field is typed or chosen, with its help.

    Args:
        name: the field.
        options: more options of the component.
    """
    option = option_of(name)
    assert option is not None, name
    label = option_name(name).removeprefix("--").replace("-", " ")
    said: dict[str, Any] = {"label": label, "info": option.help, "elem_id": f"field-{name}"}
    if name == TEMPLATE:
        said["info"] += f" {NO_TEMPLATE} writes prompts without one."
    if plain(kinds()[name]) is bool:
        return gr.Checkbox(value=bool(defaults(name)[name]), **said | options)
    if words := choices_of(name):
        default = defaults(name)[name] or ""
        choices = [(word, word) for word in words]
        if default == "":
            choices.insert(0, (default_in_words(name), ""))
        return gr.Dropdown(choices, value=default, **said | options)
    if name == METHOD:
        said["info"] = "A method, or several in one: type such as dora,lora+."
        usual = default_in_words(name)
        return gr.Dropdown([usual], value=usual, allow_custom_value=True, **said | options)
    return gr.Textbox(placeholder=default_in_words(name), **said | options)


def methods_input(place: str) -> Any:
    """Returns the component in which several methods are chosen; their names come when it loads.

    Args:
        place: the component's id on the page.
    """
    info = "All of them, if none is chosen. Several in one may be typed, such as dora,lora+."
    usual = [default_in_words(METHOD)]
    return gr.Dropdown(
        usual, value=usual, multiselect=True, allow_custom_value=True, label="methods", info=info,
        elem_id=place,
    )  # fmt: skip


def offer_methods(inputs: Sequence[Any], page: Any) -> None:
    """Lets these components offer the members, once a page that loads knows them."""

    def offered() -> list[Any]:
        warm.wait()
        from lorakin.family.registry import members  # which imports torch

        words = [member.word for member in members()]
        return [gr.Dropdown(words) for _ in inputs]

    page.load(offered, outputs=[*inputs], show_progress="hidden")


def out_input(value: str, folder: Path, place: str, what: str = "a new directory") -> Any:
    """Returns the component in which a directory in a folder is named.

    Args:
        value: the name that stands there at first.
        folder: the folder of the runs.
        place: the component's id on the page.
        what: what is named.
    """
    info = f"The name of {what} in {folder.resolve().name}."
    return gr.Textbox(value, label="out", info=info, elem_id=place)


def group(names: Sequence[str], panel: str) -> list[str]:
    """Returns the fields of a group of `lorakin train --help` that are not among `names`."""
    return [name for name, of in PANEL_OF.items() if of == panel and name not in names]


def raw_of(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Returns a form's values as the command line gets them; see `given_fields`.

    >>> raw_of(["rank", "settings", "fuse"], [" 8 ", "ratio=8 init=True", False])
    {'rank': '8', 'settings': ['ratio=8', 'init=True'], 'fuse': None, 'no_fuse': False}

    Raises:
        SettingError: a quote that is not closed.
    """
    raw: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if isinstance(value, bool):
            same = value == bool(defaults(name)[name])
            raw[name] = None if same or not value else True
            raw[f"no_{name}"] = not same and not value
        elif choices_of(name):
            raw[name] = None if value == (defaults(name)[name] or "") else value
        else:
            raw |= _typed(name, str(value or "").strip())
    return raw


def _typed(name: str, text: str) -> dict[str, Any]:
    if name == TEMPLATE and text == NO_TEMPLATE:
        return {name: None, f"no_{name}": True}
    if not text:
        return {name: None}
    if name in ONE_A_LINE:
        return {name: [line.strip() for line in text.splitlines() if line.strip()]}
    if typing.get_origin(plain(kinds()[name])) is dict:
        try:
            return {name: shlex.split(text)}
        except ValueError:
            raise SettingError(
                f"{option_name(name)} {text!r} opens a quote and does not close it"
            ) from None
    return {name: [text] if name in READERS else text}


def words_of(raw: Mapping[str, Any]) -> list[str]:
    """Returns the words of the command line that say the same.

    >>> words_of({"rank": "8", "settings": ["ratio=8"], "fuse": True, "no_fuse": False})
    ['--rank', '8', '--set', 'ratio=8', '--fuse']
    """
    words: list[str] = []
    for name, value in raw.items():
        if name.startswith("no_"):
            words += ["--" + name.replace("_", "-")] if value else []
        elif value is True:
            words.append(option_name(name))
        elif value:
            for text in value if isinstance(value, list) else [value]:
                words += [option_name(name), text]
    return words


def fields_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that a form gives, as `Recipe` takes them.

    Raises:
        SettingError: a value does not fit its field.
    """
    return given_fields([name for name in raw if not name.startswith("no_")], raw)
