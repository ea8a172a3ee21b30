"""Adds to the site what Markdown cannot: formulas, pictures, and parts that are generated from the code.

A page holds a line such as `<!-- generated: commands -->`, and the site has the commands there; `PARTS` names all of them.
A block marked `math` is LaTeX, which GitHub draws too; here it becomes MathML, which browsers draw without a script or a font.
An SVG of docs/pictures is written into the page, so that its lines have the colour of the page's text, light or dark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import inspect
import io
import json
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

MARK = re.compile(r"^<!-- generated: ([\w.-]+) -->$", re.MULTILINE)
PICTURE = re.compile(r'<img alt="([^"]*)" src="[./]*pictures/([\w-]+\.svg)"[^>]*>')


def on_config(config: Any) -> Any:
    """Formulas are a kind of fenced code."""
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def _formula(source: str, *_: Any, **__: Any) -> str:
    from latex2mathml.converter import convert

    formula = convert(source, display="block")
    if "\\" in formula:
        raise ValueError(f"a formula has a word that latex2mathml does not know: {source}")
    return formula


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put what is generated in the place of its mark; a page of no section needs no list of pages beside it."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Put the pictures of updates into the page."""
    return PICTURE.sub(lambda found: _inlined(found[2], found[1]), content)


def _inlined(name: str, alt: str) -> str:
    svg = (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8")
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)


# generated parts


def commands() -> str:
    """Every command with its arguments and options, from typer."""
    return "\n".join(_command(name, one) for name, one in click_commands().items())


def click_commands() -> dict[str, Any]:
    """Name -> click's command, in the order of `lorakin --help`."""
    import typer

    from lorakin.cli.app import app

    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def _command(name: str, command: Any) -> str:
    signed = inspect.unwrap(command.callback, stop=lambda f: hasattr(f, "__signature__"))
    hints = typing.get_type_hints(signed)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    lines = [f"## lorakin {name}", "", _plain(command.help or ""), ""]
    lines += [
        "```text",
        " ".join(["lorakin", name, *map(_usage, arguments), "[OPTIONS]"]),
        "```",
        "",
    ]
    shown = [one for one in command.params if one.name != "help"]
    panels = dict.fromkeys(getattr(one, "rich_help_panel", None) for one in shown)
    for panel in sorted(panels, key=lambda panel: panel is not None):  # first those of no panel
        lines += ["", f"**{panel}**", ""] if panel else []
        lines += ["| | value | what it does |", "|---|---|---|"]
        for one in shown:
            if getattr(one, "rich_help_panel", None) == panel:
                lines.append(
                    f"| {_names(one)} | {_value(one, hints[one.name])} | {_cell(_plain(one.help or ''))} |"
                )
    examples = [
        line.strip()
        for line in _plain(command.epilog or "").splitlines()
        if line.startswith("lorakin")
    ]
    return "\n".join([*lines, "", "```bash", *examples, "```", ""])


def _usage(argument: Any) -> str:
    name = argument.name.upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return " ".join(
        f"`{word}`" for word in [*sorted(parameter.opts, key=len), *parameter.secondary_opts]
    )


KINDS = {int: "whole number", float: "number", Path: "path", str: "text"}


def _value(parameter: Any, hint: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    (kind,) = {KINDS[one] for one in _leaves(hint)}
    said = kind + (", may be repeated" if parameter.multiple else "")
    plain = isinstance(parameter.default, str | int | float) and not isinstance(
        parameter.default, bool
    )
    return f"{said} `{parameter.default}`" if plain else said


def _leaves(hint: Any) -> set[type]:
    """The types of single values: {str} of list[str] | None."""
    inner = [one for one in typing.get_args(hint) if one is not type(None)]
    return set().union(*map(_leaves, inner)) if inner else {hint}


def _plain(text: str) -> str:
    """Without typer's marks of colour, and without the escapes of other brackets."""
    return re.sub(r"\[/?[a-z ]*\]", "", text).replace("\\[", "[")


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("*", "\\*")


def recipe_keys() -> str:
    """Every key of a recipe, with its type, its default and what the option of the same name says."""
    from lorakin.training.recipe import Recipe

    options = {one.name: one for one in click_commands()["train"].params}
    hints = typing.get_type_hints(Recipe)
    lines = ["| key | value | default | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(Recipe):
        option = options.get(field.name)
        said = (option.help or "") if option else ONLY_IN_RECIPES[field.name]
        said, _, default = _plain(said).partition("[default: ")
        default = _default(field, default.rstrip("]"))
        lines.append(f"| `{field.name}` | {_kind(hints[field.name])} | {default} | {_cell(said)} |")
    return "\n".join(lines)


ONLY_IN_RECIPES = {
    "date": "The day on which the run began, for chat templates that print it; `lorakin train` fills it in.",
    "labels": "The classes of a classifier, in their order; `lorakin train` fills them in.",
}


def _kind(hint: Any) -> str:
    """A recipe's type in words: list[str] | None is "list of text"."""
    words = {**KINDS, bool: "true or false", typing.Any: "any"}
    outer, inner = typing.get_origin(hint), typing.get_args(hint)
    if outer is list:
        return f"list of {_kind(inner[0])}"
    if outer is dict:
        return f"{_kind(inner[0])} → {_kind(inner[1])}"
    if outer is typing.Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if inner:
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    return words[hint]


def _default(field: Any, said: str) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return f"`{value!r}`" if value else ""
    if field.default is dataclasses.MISSING:
        return "required"
    return said if field.default is None else f"`{_setting(field.default)}`"


def _family() -> dict[str, Any]:
    from lorakin.cli.app import run

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(["methods", "--json"])
    return dict(json.loads(said.getvalue()))


def members() -> str:
    """The family's settings and usual learning rates, as `lorakin methods` says them."""
    lines = ["| word | settings and their defaults | usual learning rate |", "|---|---|---|"]
    for member in _family()["members"]:
        settings = " ".join(
            f"`{name}={_setting(value)}`" for name, value in member["settings"].items()
        )
        lines.append(f"| `{member['word']}` | {settings} | {member['learning_rate']:g} |")
    return "\n".join(lines)


def _setting(value: object) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def combinations() -> str:
    """Which members combine, and why the others do not."""
    family = _family()
    words = [member["word"] for member in family["members"]]
    refused = {frozenset((one["one"], one["other"])): one["reason"] for one in family["refused"]}
    reasons = list(dict.fromkeys(refused.values()))
    lines = [
        "| | " + " | ".join(f"`{word}`" for word in words) + " |",
        "|---" + "|:-:" * len(words) + "|",
    ]
    for row in words:
        cells = [
            "·" if row == column else _together(refused.get(frozenset((row, column))), reasons)
            for column in words
        ]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    )


def _together(reason: str | None, reasons: list[str]) -> str:
    return "✔" if reason is None else f"✗ {reasons.index(reason) + 1}"


def _of_the_root(name: str) -> Callable[[], str]:
    """A page of the repository's root, whose links lead from docs/project."""

    def read() -> str:
        return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")

    return read


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipe": recipe_keys,
    "members": members,
    "combinations": combinations,
    "CHANGELOG.md": _of_the_root("CHANGELOG.md"),
    "SECURITY.md": _of_the_root("SECURITY.md"),
    "CONTRIBUTING.md": _of_the_root("CONTRIBUTING.md"),
}
