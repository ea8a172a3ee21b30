"""The recipe: every setting of a training run, with its type, its default and its help text.

The fields of `Recipe` are the keys of a recipe's YAML file (`recipe_file.py`) and the options of
`lorakin train` (`cli/recipe_options.py`). What a field may be is said once, as its type.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lorakin.errors import SettingError
from lorakin.storage.schema import (
    AtLeastOne,
    Check,
    Count,
    NotNegative,
    Positive,
    SchemaError,
    checked,
)
from lorakin.training.formats import NAMES, TASKS
from lorakin.training.glue import GLUE, task_and_metric
from lorakin.training.recipe_data import DataSettings
from lorakin.training.recipe_option import DATA, DEVICES, METHOD, OPTIMISATION, OUTPUT, Option
from lorakin.training.recipe_run import RunSettings
from lorakin.training.recipe_values import as_kind

if TYPE_CHECKING:
    from lorakin.family import Method

MODEL_HELP = "A hub id, a model's directory, a .gguf file, or the packaged smollm2 or minilm."
DATA_HELP = (
    "A .jsonl, .json, .csv, .tsv, .txt or .parquet file, perhaps .gz; "
    "or a hub data set, as org/set:split."
)
DTYPE_HELP = (
    "Dtype of the base: float32, bfloat16, float16, base (that of its files), or auto (the fastest "
    "here; float32 for a classifier)."
)
EARLIER_WORDS = ("answer",)
"""What recipes of lorakin 0.1 say as `loss_on` for "answers"."""


def _is_day(text: str) -> bool:
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


Epochs = Annotated[float, Check("a number above 0, below 1e9", lambda value: 0 < value < 1e9)]
Warmup = Annotated[float, Check("a share of the steps in [0, 1)", lambda value: 0 <= value < 1)]
Holdout = Annotated[
    float,
    Check(
        "a share above 0 and below 1, for a run is judged by the rows that it holds out; 0.001 "
        "holds out one row of a thousand",
        lambda value: 0 < value < 1,
    ),
]
Seed = Annotated[int, Check("a whole number in [0, 2**32)", lambda value: 0 <= value < 2**32)]
Day = Annotated[str, Check("a day such as 2026-11-30", _is_day)]
Layout = Annotated[str, Check(f"one of {', '.join(NAMES)}", NAMES.__contains__)]
TASK_HELP = f"{', '.join(TASKS)}; or a task of GLUE, with its metric: {', '.join(GLUE)}"
Task = Annotated[str, Check(f"one of {TASK_HELP}", {*TASKS, *GLUE}.__contains__)]
Sources = Annotated[list[str], Check("at least one file or hub data set", bool)]


@dataclasses.dataclass
class Recipe(RunSettings, DataSettings):
    """The settings of one run of `lorakin train`.

        >>> recipe = Recipe(model="smollm2", data="rows.jsonl", out="adapter", rank=8, lr="2e-4")
        >>> recipe.lr, recipe.data
        (0.0002, ['rows.jsonl'])
        >>> recipe.build().learning_rate
        0.0002

    `method` names a member of the family, or several: `dora,lora+`. Where `rank`, `alpha`,
    `dropout` or `lr` is None, the method's own default counts. `settings` holds the members' other
    settings, such as `ratio: 8`.

    Raises:
        SettingError: a value of the wrong type or outside its range; two fields that contradict
            each other; a schedule that cannot be built.
    """

    model: Annotated[str, Option(DATA, MODEL_HELP, ("--model", "-m"))]
    data: Annotated[
        Sources, Option(DATA, f"{DATA_HELP} May be given several times.", ("--data", "-d"))
    ]
    out: Annotated[str, Option(OUTPUT, "A new directory for the adapter.", ("--out", "-o"))]
    method: Annotated[
        str,
        Option(
            METHOD, "A member of the family, or several: dora,lora+. lorakin methods lists them."
        ),
    ] = "lora"
    rank: Annotated[
        int | None, Option(METHOD, "Rank of the pairs.", default="the method's own, 16 for lora")
    ] = None
    alpha: Annotated[
        float | None,
        Option(
            METHOD,
            "alpha; the pair is scaled by alpha/rank.",
            default="the method's own, 32 for lora",
        ),
    ] = None
    dropout: Annotated[
        float | None, Option(METHOD, "Dropout of the adapter's input.", default="0")
    ] = None
    rslora: Annotated[
        bool | None, Option(METHOD, "Scale by alpha/√rank instead of alpha/rank.", default="no")
    ] = None
    settings: Annotated[
        dict[str, Any],
        Option(
            METHOD,
            "Any other setting of the method, such as ratio=8; lorakin methods lists them.",
            ("--set",),
        ),
    ] = dataclasses.field(default_factory=dict)
    targets: Annotated[
        list[str],
        Option(
            METHOD,
            "Modules to adapt: names, globs or regular expressions. none adapts no layers, so "
            "that only heads and tokens train.",
        ),
    ] = dataclasses.field(default_factory=lambda: ["all-linear"])
    exclude: Annotated[list[str], Option(METHOD, "Modules to leave out.")] = dataclasses.field(
        default_factory=list
    )
    layers: Annotated[
        str | None, Option(METHOD, "Adapt only modules in these layers, such as 0-3,8,-1.")
    ] = None
    rank_pattern: Annotated[
        dict[str, AtLeastOne],
        Option(
            METHOD, "Another rank for some modules, as in PEFT: down_proj=32.", ("--rank-pattern",)
        ),
    ] = dataclasses.field(default_factory=dict)
    alpha_pattern: Annotated[
        dict[str, Positive],
        Option(
            METHOD,
            "Another alpha for some modules, as in PEFT: down_proj=64.",
            ("--alpha-pattern",),
        ),
    ] = dataclasses.field(default_factory=dict)
    modules_to_save: Annotated[list[str], Option(METHOD, "Modules to train whole.")] = (
        dataclasses.field(default_factory=list)
    )
    rank_above: Annotated[
        Literal["refuse", "clamp"],
        Option(
            METHOD,
            "What to do with a rank that is larger than a weight allows (its smaller side): refuse "
            "it, or clamp it to that.",
        ),
    ] = "refuse"
    trainable_tokens: Annotated[
        list[str],
        Option(
            METHOD, "Tokens, or their ids, whose rows in the embedding and the head are trained."
        ),
    ] = dataclasses.field(default_factory=list)
    bias: Annotated[
        Literal["none", "lora_only", "all"],
        Option(METHOD, "Biases to train: none, lora_only (of the adapted modules) or all."),
    ] = "none"
    columns: Annotated[
        dict[str, str],
        Option(
            DATA,
            "Which column holds what: prompt=question,completion=reply. Other columns are ignored.",
        ),
    ] = dataclasses.field(default_factory=dict)
    format: Annotated[
        Layout | None, Option(DATA, f"Format of the rows: {', '.join(NAMES)}.", default="detected")
    ] = None
    task: Annotated[
        Task | None,
        Option(DATA, f"What is learned: {TASK_HELP}.", default="detected"),
    ] = None
    eval_data: Annotated[
        str | None, Option(DATA, "Held-out rows, as for --data.", default="split off the data")
    ] = None
    holdout: Annotated[
        Holdout, Option(DATA, "Share of the rows to hold out, at most 256 rows.")
    ] = 0.1
    lr: Annotated[
        Positive | None,
        Option(
            OPTIMISATION,
            "Learning rate.",
            ("--lr", "--learning-rate"),
            default="the method's own, 2e-4 for lora",
        ),
    ] = None
    schedule: Annotated[
        str, Option(OPTIMISATION, "Learning-rate schedule: cosine, linear, constant …")
    ] = "cosine"
    schedule_args: Annotated[
        dict[str, Any],
        Option(
            OPTIMISATION, "An argument of the schedule, such as min_lr=1e-5.", ("--schedule-arg",)
        ),
    ] = dataclasses.field(default_factory=dict)
    warmup: Annotated[Warmup, Option(OPTIMISATION, "Warm-up, as a share of the steps.")] = 0.05
    weight_decay: Annotated[NotNegative, Option(OPTIMISATION, "AdamW's weight decay.")] = 0.0
    max_grad_norm: Annotated[
        NotNegative, Option(OPTIMISATION, "Clip gradients to this norm; 0 turns clipping off.")
    ] = 1.0
    steps: Annotated[
        AtLeastOne | None, Option(OPTIMISATION, "Optimizer steps.", default="one epoch")
    ] = None
    epochs: Annotated[Epochs | None, Option(OPTIMISATION, "Passes over the data.")] = None
    batch_size: Annotated[AtLeastOne, Option(OPTIMISATION, "Rows per batch.")] = 8
    accumulate: Annotated[AtLeastOne, Option(OPTIMISATION, "Batches per optimizer step.")] = 1
    max_length: Annotated[AtLeastOne, Option(DATA, "Tokens per row; longer rows are cut.")] = 1024
    loss_on: Annotated[
        Literal["last", "answers", "all"],
        Option(DATA, "answers: all turns of the assistant; last: the last one; all: every token."),
    ] = "answers"
    chat_template: Annotated[
        bool | str,
        Option(DATA, "A file with another chat template than the model's, or alpaca."),
    ] = True
    template_args: Annotated[
        dict[str, Any],
        Option(
            DATA, "A variable of the chat template: enable_thinking=false.", ("--template-arg",)
        ),
    ] = dataclasses.field(default_factory=dict)
    date: Day | None = None
    gradient_checkpointing: Annotated[
        bool, Option(DEVICES, "Recompute activations in backward: less memory, more time.")
    ] = False
    fuse: Annotated[
        bool,
        Option(DEVICES, "Compute norms, activations and loss in less memory (Llama-like models)."),
    ] = False
    dtype: Annotated[str, Option(DEVICES, DTYPE_HELP)] = "auto"
    quantize: Annotated[
        str | None,
        Option(
            DEVICES,
            "Keep the base's linear layers in 4 or 8 bits: nf4, int8, torchao-int8.",
            default="no",
        ),
    ] = None
    save_every: Annotated[
        Count | None,
        Option(OUTPUT, "Steps between checkpoints; 0 writes none.", default="a fifth of the run"),
    ] = None
    seed: Annotated[
        Seed,
        Option(OPTIMISATION, "Seed of the initial values, the rows' order and the held-out rows."),
    ] = 0
    labels: list[str] | None = None

    def __post_init__(self) -> None:
        for name in kinds():
            setattr(self, name, field_value(name, getattr(self, name)))
        self.task, self.metric = task_and_metric(self.task, self.metric, self.data)
        if self.steps is not None and self.epochs is not None:
            raise SettingError("give steps or epochs, not both")
        self.check_data(len(self.data), self.steps, self.eval_data)

        from lorakin.training import schedules  # which imports transformers

        schedules.check(self.schedule, self.schedule_args, self.lr or 1.0, self.steps, self.warmup)

    def build(self) -> Method:
        """Returns the method with the recipe's settings; the others are the members' defaults.

        Raises:
            SettingError: an unknown member, a setting that none of them has, a value outside its
                range, or members that do not combine.
        """
        from lorakin.family import method_named  # which imports torch

        own = {name: getattr(self, name) for name in ("rank", "alpha", "dropout", "rslora")}
        given = {name: value for name, value in own.items() if value is not None}
        if twice := given.keys() & self.settings.keys():
            raise SettingError(
                f"{min(twice)} is given twice, as a setting of its own and under settings"
            )
        return method_named(self.method, given | self.settings)


@functools.cache
def kinds() -> dict[str, Any]:
    """Returns the type of each field of `Recipe`, by name, with its checks and its `Option`."""
    hints = typing.get_type_hints(Recipe, include_extras=True)
    # Those of `RunSettings` and `DataSettings` last.
    fields = sorted(dataclasses.fields(Recipe), key=lambda field: bool(field.kw_only))
    return {field.name: hints[field.name] for field in fields}


def field_value(name: str, value: Any, called: str | None = None) -> Any:
    """Returns a field's value in the field's type.

    >>> field_value("lr", "2e-4")
    0.0002
    >>> field_value("max_rows", -3, called="--max-rows")
    Traceback (most recent call last):
        ...
    lorakin.errors.SettingError: --max-rows is -3, expected a whole number ≥ 1

    Args:
        name: the field.
        value: what the user gave.
        called: the name that the message says; None takes the field's.

    Raises:
        SettingError: a value of the wrong type or outside its range.
    """
    if name == "loss_on" and value in EARLIER_WORDS:
        value = "answers"
    kind = kinds()[name]
    try:
        return checked(kind, as_kind(kind, value), called or name)
    except SchemaError as error:
        # A file can say null; an option that says nothing is left out.
        message = str(error).removesuffix(" or null") if called else str(error)
        raise SettingError(message) from None


def option_of(name: str) -> Option | None:
    """Returns the `Option` of a field, or None if the command line does not offer it.

    >>> option_of("warmup").help
    'Warm-up, as a share of the steps.'
    """
    extras: Sequence[Any] = getattr(kinds()[name], "__metadata__", ())
    return next((extra for extra in extras if isinstance(extra, Option)), None)
