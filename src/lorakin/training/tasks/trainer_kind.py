"""Which Trainer trains a task, and the settings that its package adds."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import transformers

from lorakin.errors import SettingError
from lorakin.storage.schema import SchemaError, checked
from lorakin.training.messages import SAYS
from lorakin.training.recipe_values import plain


@dataclasses.dataclass(frozen=True)
class TrainerKind:
    """A Trainer's class with its arguments.

    Attributes:
        trainer: transformers' Trainer or a class of it.
        config: the class of its arguments.
        arguments: arguments besides those that every run has.
        mixins: what is mixed in before the class.
        options: makes what the trainer is given by name, of the adapted model; None for a Trainer
            that takes the loss as a function.
        order: transformers' word for the order of rows, if the trainer needs a certain one.
    """

    trainer: Any = transformers.Trainer
    config: Any = transformers.TrainingArguments
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mixins: tuple[Any, ...] = ()
    options: Callable[[Any], dict[str, Any]] | None = None
    order: str | None = None


def from_trl(module: str, task: str) -> Any:
    """Returns a module of TRL.

    Raises:
        SettingError: TRL is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an API that may change: the version is pinned
            return importlib.import_module(module)
    except ImportError as error:
        raise SettingError(
            f"--task {task} needs the package trl ({error}): pip install 'lorakin[train]'"
        ) from None


def quiet_config(config: Any, **arguments: Any) -> Any:
    """Returns a Trainer's arguments, without its warnings about names that TRL still uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return config(**arguments)


def checked_arguments(
    given: Mapping[str, Any], known: Mapping[str, Any], task: str
) -> dict[str, Any]:
    """Returns the arguments of a task's trainer as their types.

    >>> checked_arguments({"beta": "0.2"}, {"beta": float}, "dpo")
    Traceback (most recent call last):
        ...
    lorakin.errors.SettingError: --task-arg beta is '0.2', expected a number

    Args:
        given: by name.
        known: the type of each.
        task: the word of the task.

    Raises:
        SettingError: an unknown name, or a value that is none.
    """
    if unknown := [name for name in given if name not in known]:
        has = f"takes {', '.join(known)}" if known else "takes none"
        raise SettingError(f"--task-arg {unknown[0]} is unknown: --task {task} {has}")
    try:
        return {
            name: checked(known[name], _as_kind(known[name], value), f"--task-arg {name}")
            for name, value in given.items()
        }
    except SchemaError as error:
        raise SettingError(str(error)) from None


def _as_kind(kind: Any, value: Any) -> Any:
    """Returns a value of the command line as its type: words with commas are a list."""
    kind = plain(kind)
    if kind is bool and isinstance(value, str):
        return SAYS.get(value.lower(), value)
    if getattr(kind, "__origin__", None) is list and not isinstance(value, list):
        parts = str(value).split(",")
        of_numbers = kind.__args__ == (float,)
        return [float(part) if of_numbers and _is_number(part) else part for part in parts]
    return value


def _is_number(text: str) -> bool:
    try:
        return bool(float(text) or True)
    except ValueError:
        return False
