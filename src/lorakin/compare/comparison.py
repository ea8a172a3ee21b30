"""The options of a comparison: model, data, methods, budget, seeds and learning rates."""

from __future__ import annotations

import dataclasses
from typing import Any

from lorakin.compare.arms import PLAIN
from lorakin.compare.budget import Budget
from lorakin.compare.next_trials import Sweep
from lorakin.errors import SettingError
from lorakin.family import method_named
from lorakin.family.settings import require
from lorakin.training.recipe import Recipe

LEAST_STEPS = 4
"""The fewest steps of a run, which its warm-up and learning-rate schedule need."""


@dataclasses.dataclass
class Comparison:
    """The options of `lorakin compare`.

    Attributes:
        model: a packaged model, a directory, a `.gguf` file or a hub id.
        data: the rows; they are split unless `eval_data` is given.
        out: the directory of the comparison.
        methods: the words of each method.
        budget: the budget of each trial, such as "steps=200" (see `Budget.parse`).
        seeds: how many runs each method has at its best learning rate.
        sweep: "auto", or learning rates such as "1e-4,3e-4".
        eval_data: rows to report on.
        rank: the rank at which methods are compared; None is plain LoRA's default.
        alpha: plain LoRA's alpha; None keeps alpha / rank of the default.
        dropout: the dropout of the methods that support it.
        settings: more settings, for the methods that have them.
        metric: the measure that decides: "loss" or a metric of the task; None is the task's first.
        parsed_budget: `budget` as a `Budget`.
        parsed_sweep: `sweep` as a `Sweep`.
        recipe: fields of the recipe that all trials share, such as batch_size.

    Raises:
        SettingError: a value is out of its range.
    """

    model: str
    data: str
    out: str
    methods: list[str]
    budget: str = "steps=200"
    seeds: int = 3
    sweep: str = "auto"
    eval_data: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    metric: str | None = None
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"--seeds must be at least 1, not {self.seeds}")
        require(0 <= self.dropout < 1, f"--dropout must lie in [0, 1), not {self.dropout}")

        plain = method_named(PLAIN, {})
        self.rank = self.rank if self.rank is not None else int(plain.setting("rank"))
        scaling = plain.setting("alpha") / plain.setting("rank")
        self.alpha = self.alpha if self.alpha is not None else scaling * self.rank
        method_named(PLAIN, {"rank": self.rank, "alpha": self.alpha})  # raises if out of range

        self.parsed_budget, self.parsed_sweep = Budget.parse(self.budget), parse_sweep(self.sweep)
        if self.parsed_budget.steps is not None and self.parsed_budget.steps < LEAST_STEPS:
            raise SettingError(
                f"--budget {self.budget} fits no trial: a run needs at least {LEAST_STEPS} steps"
            )
        self.base_recipe = Recipe(model=self.model, data=[self.data], out=self.out, **self.recipe)
        # A task of GLUE brings its own.
        self.metric = self.metric or self.base_recipe.metric

    @property
    def size(self) -> tuple[int, float]:
        """The rank and alpha / rank at which methods are compared."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.rank, self.alpha / self.rank

    def as_dict(self) -> dict[str, Any]:
        """Returns the options for the comparison's file.

        Without `out`, for it may be moved, and without `metric`: the trials are the same, and may
        be looked at by another.
        """
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("out", "metric")}


def parse_sweep(text: str) -> Sweep:
    """Reads learning rates from the command line.

    >>> parse_sweep("3e-4,1e-4").rates
    (0.0001, 0.0003)

    Raises:
        SettingError: the text is neither "auto" nor positive numbers.
    """
    if text == "auto":
        return Sweep()
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = ()
    require(
        bool(rates) and all(0 < lr < float("inf") for lr in rates),
        f"--lr-sweep takes auto, or learning rates such as 1e-4,3e-4, not {text!r}",
    )
    return Sweep(rates)
