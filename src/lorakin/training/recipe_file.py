"""A recipe as a YAML file that runs the same training again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorakin.errors import SettingError
from lorakin.storage import atomic
from lorakin.training.recipe import Recipe, kinds
from lorakin.training.yaml_values import read_yaml

FIELDS = {field.name for field in dataclasses.fields(Recipe)}


def read_recipe(path: Path | None, flags: Mapping[str, Any]) -> Recipe:
    """Returns the recipe in the YAML file `path`, if any, with `flags` over it.

    Flags that are None or empty do not count. The settings of a method and the arguments of a
    schedule or a task in the file go with that method, schedule and task: a flag that names another
    drops them.

    Raises:
        SettingError: no such file; not YAML; an unknown or wrong setting; no model, data or out.
    """
    settings = settings_in(path) if path is not None else {}
    given = without_empty(flags)
    if "steps" in given:
        settings.pop("epochs", None)
    if "epochs" in given:
        settings.pop("steps", None)
    inner = settings.pop("settings", None) or {}
    if not isinstance(inner, dict):
        raise SettingError(f"settings must be lines such as 'ratio: 8', not {inner!r}")
    if given.get("method") not in (None, settings.get("method")):
        inner = {}
    if given.get("schedule") not in (None, settings.get("schedule")):
        settings.pop("schedule_args", None)
    if given.get("task") not in (None, settings.get("task")):
        settings.pop("task_args", None)

    settings |= given | {"settings": inner | given.get("settings", {})}
    for name in ("model", "data", "out"):
        if name not in settings:
            raise SettingError(f"--{name} is missing; give it as a flag or in the recipe")
    recipe = Recipe(**settings)
    if recipe.adapter is not None and "method" in settings:
        from lorakin.training.starting import read_start  # which imports torch

        # The recipe cannot tell its default from what was given.
        start = read_start(recipe.adapter)
        assert start is not None
        start.check({"method": recipe.method})
    return recipe


def without_empty(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags that have a value.

    >>> without_empty({"rank": 8, "alpha": None, "targets": []})
    {'rank': 8}
    """
    return {name: value for name, value in flags.items() if value not in (None, [], {})}


def settings_in(path: Path) -> dict[str, Any]:
    """Returns the settings that the YAML file `path` gives, by name.

    Raises:
        SettingError: no such file, not YAML, or an unknown setting.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise SettingError(
            f"the recipe {path} holds no settings; expected lines such as 'model: smollm2'"
        )
    settings = {str(key): value for key, value in content.items()}
    if unknown := sorted(settings.keys() - FIELDS):
        raise SettingError(
            f"the recipe {path} has unknown settings: {', '.join(unknown)}; "
            f"known are: {', '.join(sorted(FIELDS))}"
        )
    return settings


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe as YAML, whole or not at all, without the settings that are None or empty.

    Raises:
        OutputError: the file cannot be written.
    """
    header = f"# Run it again: lorakin train {path.name} --out ANOTHER_DIRECTORY\n"
    atomic.write(path.parent, {path.name: (header + as_yaml(recipe)).encode()})


def as_yaml(recipe: Recipe) -> str:
    """Returns a recipe as YAML, without the settings that are None or empty."""
    settings = without_empty({name: getattr(recipe, name) for name in kinds()})
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text
