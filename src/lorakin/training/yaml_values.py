"""YAML from users: recipe files, and the values of `--set` and its like. Plain values, no code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lorakin.errors import SettingError
from lorakin.storage import files
from lorakin.training.recipe_values import as_number

MOST_BYTES = 1 << 20
"""The longest recipe that is read."""
UNREADABLE = (yaml.YAMLError, RecursionError, ValueError, OverflowError)
"""What PyYAML raises for text that is not YAML."""


class _Plain(yaml.SafeLoader):
    """Loads plain values. It refuses aliases: a few lines of them can fill any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} stands in it twice", None
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "the recipe") -> Any:
    """Returns what the YAML file `path` holds: numbers, texts, lists and mappings.

    Args:
        path: the file.
        what: what an error calls it.

    Raises:
        SettingError: it cannot be read, is longer than `MOST_BYTES`, or is not YAML.
    """
    try:
        content = files.read_limited(path, MOST_BYTES, SettingError)
        return yaml.load(content.decode("utf-8"), _Plain)
    except SettingError as error:
        raise SettingError(f"{what}: {error}") from None
    except OSError as error:
        raise SettingError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SettingError(f"{what} {path} cannot be read: {error}") from None
    except UNREADABLE as error:
        raise SettingError(f"{what} {path} is not YAML: {error}") from None


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """Returns the columns that `--columns` names: a format's column → the user's.

    >>> parse_columns(["prompt=question,completion=answer"])
    {'prompt': 'question', 'completion': 'answer'}

    Raises:
        SettingError: a part without `=`, or a column that is given twice.
    """
    columns: dict[str, str] = {}
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        target, equals, source = (piece.strip() for piece in part.partition("="))
        if not (equals and target and source):
            raise SettingError(
                f"--columns takes FORMATS=YOURS, such as prompt=question, not {part!r}"
            )
        if target in columns:
            raise SettingError(f"--columns gives {target} twice")
        columns[target] = source
    return columns


def parse_settings(texts: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Returns the settings that an option such as `--set` gives, with values as YAML reads them.

    >>> parse_settings(["ratio=8", "dropout=1e-1"])
    {'ratio': 8, 'dropout': 0.1}

    Args:
        texts: one NAME=VALUE each.
        option: what an error calls the option.

    Raises:
        SettingError: a text without `=`, a name that is given twice, or a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if name in settings:
            raise SettingError(f"{option} gives {name} twice")
        if not (equals and name):
            raise SettingError(f"{option} takes NAME=VALUE, such as ratio=8, not {text!r}")
        try:
            settings[name] = as_number(yaml.load(value, _Plain))
        except UNREADABLE:
            raise SettingError(f"{option} {text!r}: {value!r} is not a value") from None
    return settings
