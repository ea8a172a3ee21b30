"""A recipe: everything that decides a training run, as one YAML file that runs it again."""

from __future__ import annotations

import dataclasses
import datetime
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lorakin.errors import SettingError
from lorakin.family import Method, method_named
from lorakin.family.settings import one_of, require
from lorakin.inject.biases import ADAPTED, ALL, NONE
from lorakin.inject.placement import RANK_ABOVE
from lorakin.storage import atomic, files
from lorakin.training import schedules
from lorakin.training.answers import ANSWERS, LOSS_ON
from lorakin.training.formats import NAMES

BIASES = (NONE, ADAPTED, ALL)


@dataclasses.dataclass
class Recipe:
    """The settings of one run of `lorakin train`; the fields are the command's options.

    `method` names a member of the family, or several, as `dora,lora+`. `rank`, `alpha`, `dropout` and `lr` left at None take
    the method's own defaults; `settings` holds whatever else its members have, such as `ratio: 8`.
    """

    model: str
    data: list[str]
    out: str
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: list[str] = dataclasses.field(default_factory=lambda: ["all-linear"])
    exclude: list[str] = dataclasses.field(default_factory=list)
    layers: str | None = None
    modules_to_save: list[str] = dataclasses.field(default_factory=list)
    rank_above: str = "refuse"
    trainable_tokens: list[str] = dataclasses.field(default_factory=list)
    bias: str = "none"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    format: str | None = None
    eval_data: str | None = None
    holdout: float = 0.1
    lr: float | None = None
    schedule: str = "cosine"
    schedule_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    max_length: int = 1024
    loss_on: str = ANSWERS
    chat_template: bool | str = True
    template_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None
    gradient_checkpointing: bool = False
    fuse: bool = False
    dtype: str = "auto"
    quantize: str | None = None
    save_every: int | None = None
    seed: int = 0
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(
                self, field.name, _coerced(field.name, getattr(self, field.name), hints[field.name])
            )
        require(self.steps is None or self.epochs is None, "give steps or epochs, not both")
        require(
            self.steps is None or self.steps >= 1, f"steps must be at least 1, not {self.steps}"
        )
        require(
            self.epochs is None or 0 < self.epochs < 1e9,
            f"epochs must be positive, not {self.epochs}",
        )
        for name in ("batch_size", "accumulate", "max_length"):
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}"
            )
        require(
            self.weight_decay >= 0, f"weight_decay must not be negative, not {self.weight_decay}"
        )
        require(
            self.max_grad_norm >= 0, f"max_grad_norm must not be negative, not {self.max_grad_norm}"
        )
        require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), not {self.seed}")
        require(0 < self.holdout < 1, f"holdout must lie between 0 and 1, not {self.holdout}")
        require(
            0 <= self.warmup < 1,
            f"warmup must be a share of the steps in [0, 1), not {self.warmup}",
        )
        one_of(self, "rank_above", RANK_ABOVE)
        self.loss_on = (
            ANSWERS if self.loss_on == "answer" else self.loss_on
        )  # its name in recipes of lorakin 0.1
        one_of(self, "loss_on", LOSS_ON)
        require(bool(self.data), "data is missing; give a file or a hub data set")
        require(
            self.format in (None, *NAMES),
            f"format must be one of {', '.join(NAMES)}, not {self.format!r}",
        )
        require(_is_date(self.date), f"date must be a day such as 2026-11-30, not {self.date!r}")
        require(self.bias in BIASES, f"bias must be {', '.join(BIASES)}, not {self.bias!r}")
        require(
            self.lr is None or 0 < self.lr < float("inf"), f"lr must be positive, not {self.lr}"
        )
        require(
            self.save_every is None or self.save_every >= 0,
            f"save_every must not be negative, not {self.save_every}",
        )
        schedules.check(self.schedule, self.schedule_args, self.lr or 1.0, self.steps, self.warmup)

    def build(self) -> Method:
        """The method with the recipe's settings, and its members' own defaults for the others.

        Raises:
            SettingError: an unknown member, a setting that none has, a value outside its range, members that do not combine.
        """
        given = {name: getattr(self, name) for name in ("rank", "alpha", "dropout", "rslora")}
        given = {name: value for name, value in given.items() if value is not None}
        for name in self.settings:
            require(
                name not in given,
                f"{name} is given twice, as a setting of its own and under settings",
            )
        return method_named(self.method, given | self.settings)

    def save(self, path: Path) -> None:
        """Write it as YAML, whole or not at all, without the settings that are None.

        Raises:
            OutputError: it cannot be written there.
        """
        settings = {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if value not in (None, [], {})
        }
        header = f"# Run it again: lorakin train {path.name} --out ANOTHER_DIRECTORY\n"
        text = header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        atomic.write(path.parent, {path.name: text.encode()})


FIELDS = {field.name for field in dataclasses.fields(Recipe)}


def read_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe in the YAML file `path`, if any, with `flags` (those that are not None) over it.

    Raises:
        SettingError: no such file, not YAML, an unknown setting, a wrong type, or model, data or out missing.
    """
    settings = settings_in(path) if path is not None else {}
    given = {
        key: value for key, value in flags.items() if value is not None and value not in ([], {})
    }
    if "steps" in given:
        settings.pop("epochs", None)
    if "epochs" in given:
        settings.pop("steps", None)
    inner = settings.pop("settings", None) or {}
    require(isinstance(inner, dict), f"settings must be lines such as 'ratio: 8', not {inner!r}")
    if given.get("method") not in (None, settings.get("method")):
        inner = {}  # they are another method's
    if given.get("schedule") not in (None, settings.get("schedule")):
        settings.pop("schedule_args", None)
    settings |= given | {"settings": inner | given.get("settings", {})}
    for name in ("model", "data", "out"):
        require(name in settings, f"--{name} is missing; give it as a flag or in the recipe")
    return Recipe(**settings)


def settings_in(path: Path) -> dict[str, Any]:
    """The settings that the recipe in the YAML file `path` gives, by name.

    Raises:
        SettingError: no such file, not YAML, or an unknown setting.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise SettingError(
            f"the recipe {path} holds no settings; expected lines such as 'model: smollm2'"
        )
    settings = {str(key): value for key, value in content.items()}
    if unknown := sorted(set(settings) - FIELDS):
        raise SettingError(
            f"the recipe {path} has unknown settings: {', '.join(unknown)}; known are: {', '.join(sorted(FIELDS))}"
        )
    return settings


class _Plain(yaml.SafeLoader):
    """YAML's plain values. No aliases: a few lines of them stand for more values than any memory holds."""

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


MOST_BYTES = 1 << 20
"""Of a recipe: one that is longer is something else."""


def read_yaml(path: Path, what: str = "the recipe") -> Any:
    """What the YAML file `path` holds: numbers, texts, lists and mappings, nothing that is run.

    Raises:
        SettingError: it cannot be read, is too long, or is not YAML.
    """
    try:
        content = files.content(path, MOST_BYTES, SettingError)
        return yaml.load(content.decode("utf-8"), _Plain)
    except SettingError as error:
        raise SettingError(f"{what}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{what} {path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise SettingError(f"{what} {path} is not YAML: {error}") from None


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """`prompt=question,completion=answer` → {"prompt": "question", "completion": "answer"}.

    Raises:
        SettingError: a part without `=`, or a column that stands in it twice.
    """
    columns: dict[str, str] = {}
    for part in (part.strip() for text in texts for part in text.split(",") if part.strip()):
        target, equals, source = (piece.strip() for piece in part.partition("="))
        require(
            bool(equals and target and source),
            f"--columns takes FORMATS=YOURS, such as prompt=question, not {part!r}",
        )
        require(target not in columns, f"--columns gives {target} twice")
        columns[target] = source
    return columns


def parse_settings(texts: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """`ratio=8` → {"ratio": 8}; values as YAML reads them. `option` is where they were given.

    Raises:
        SettingError: a text without `=`, or with a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        require(name.strip() not in settings, f"{option} gives {name.strip()} twice")
        require(
            bool(equals and name.strip()),
            f"{option} takes NAME=VALUE, such as ratio=8, not {text!r}",
        )
        try:
            settings[name.strip()] = _plain(yaml.load(value, _Plain))
        except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
            raise SettingError(f"{option} {text!r}: {value!r} is no value") from None
    return settings


def _plain(value: Any) -> Any:
    """2e-4, which YAML reads as text, as the number that it is."""
    if value == "None":
        return None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _is_date(text: str | None) -> bool:
    try:
        return text is None or bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


def _coerced(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: YAML reads 2e-4 as text, and a lone target need not be a list."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if bool in options and str in options and isinstance(value, str):
        return value
    if typing.get_origin(kind) is dict:
        require(isinstance(value, dict), f"{name} must be lines such as 'ratio: 8', not {value!r}")
        as_text = typing.get_args(kind)[1] is str
        return {str(key): str(item) if as_text else _plain(item) for key, item in value.items()}
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        require(
            all(isinstance(item, str | int | bool) for item in items),
            f"{name} must be a list of names, not {value!r}",
        )
        return [str(item) for item in items]
    try:
        if kind is bool:
            require(isinstance(value, bool), f"{name} must be true or false, not {value!r}")
            return value
        if kind is int:
            require(
                not isinstance(value, bool) and float(value) == int(float(value)),
                f"{name} must be whole, not {value!r}",
            )
            return int(float(value))
        if kind is float:
            require(not isinstance(value, bool), f"{name} must be a number, not {value!r}")
            return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(f"{name} must be a number, not {value!r}") from None
    require(isinstance(value, str | int | float), f"{name} must be text, not {value!r}")
    return str(value)
