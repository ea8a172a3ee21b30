"""The learning rate's schedules: transformers', each checked before anything is loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from lorakin.errors import SettingError
from lorakin.family.settings import require

NAMES = tuple(kind.value for kind in transformers.SchedulerType)
GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "verbose")
"""Arguments that the run itself gives a schedule."""
WATCHERS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the held-out loss instead of the step."""
ENOUGH, LOOKS = 1_000_000, 1000
"""Steps of a run whose length is not known yet; and at how many of them its rates are checked."""


def check(
    name: str, arguments: Mapping[str, Any], lr: float, steps: int | None, warmup: float
) -> None:
    """Builds a schedule and looks along it, so that what is wrong is said before a run.

    Args:
        name: one of `NAMES`.
        arguments: the schedule's own, such as `min_lr`.
        lr: the highest learning rate.
        steps: of the run; None if it is not known yet.
        warmup: the share of the steps that warms up.

    Raises:
        SettingError: no such schedule; an argument that it does not take, lacks or cannot use;
            rates that are no numbers, all 0, or above `lr`.
    """
    require(name in NAMES, f"schedule must be one of {', '.join(NAMES)}, not {name!r}")
    takes = taken(name)
    if unknown := [key for key in arguments if key not in takes]:
        has = f"it has {', '.join(takes)}" if takes else "it has none"
        raise SettingError(f"schedule {name} has no argument {unknown[0]!r}; {has}")
    total = steps or ENOUGH
    try:
        rates = _rates(name, arguments, lr, total, int(warmup * total))
    except Exception as error:  # whatever a schedule makes of an argument that it cannot have
        needs = (
            f"; its arguments are {', '.join(takes)} (--schedule-arg name=value)" if takes else ""
        )
        raise SettingError(
            f"schedule {name} cannot be made with {_said(arguments)}: {error}{needs}"
        ) from error
    what = f"schedule {name} with {_said(arguments)}"
    for rate in rates:
        require(math.isfinite(rate) and rate >= 0, f"{what} gives a learning rate of {rate:g}")
        require(
            rate <= lr * (1 + 1e-6), f"{what} gives a learning rate of {rate:g}, above --lr {lr:g}"
        )
    require(max(rates) > 0, f"{what} gives a learning rate of 0 in every one of {total} steps")
    decay = arguments.get("num_decay_steps", 0) + int(warmup * total)
    require(
        decay <= total, f"{what} and the warm-up have {decay} steps in all, and the run has {total}"
    )


def check_evaluations(name: str, arguments: Mapping[str, Any], evaluations: int) -> None:
    """Checks that a run evaluates often enough for a schedule that follows the held-out loss.

    Args:
        name: the schedule's.
        arguments: the schedule's own, such as `patience`.
        evaluations: how often the run evaluates.

    Raises:
        SettingError: the rate could never change.
    """
    if name not in WATCHERS:
        return
    default = inspect.signature(_function(name)).parameters["patience"].default
    needed = int(arguments.get("patience", default)) + 2  # the first sets the mark
    require(
        evaluations >= needed,
        f"schedule {name} changes the rate after {needed} evaluations on the held-out rows at the "
        f"earliest, and this run has {evaluations}: give --schedule-arg patience=… or a smaller "
        "--eval-every",
    )


def taken(name: str) -> tuple[str, ...]:
    """Returns the arguments of a schedule that a user can give.

    >>> "min_lr" in taken("cosine_with_min_lr")
    True
    """
    found = inspect.signature(_function(name)).parameters.values()
    return tuple(
        one.name for one in found if one.name not in GIVEN and one.kind is not one.VAR_KEYWORD
    )


def _function(name: str) -> Any:
    """Returns the function or class that makes the schedule."""
    if name == "reduce_lr_on_plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau
    if name == "greedy":
        return transformers.optimization.GreedyLR
    return TYPE_TO_SCHEDULER_FUNCTION[transformers.SchedulerType(name)]


def _rates(
    name: str, arguments: Mapping[str, Any], lr: float, steps: int, warmup: int
) -> Sequence[float]:
    """Returns learning rates along the run: at its first and last step, and at many between."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    made: Any = transformers.get_scheduler(
        name, optimizer, warmup, steps, scheduler_specific_kwargs=dict(arguments)
    )
    if name in WATCHERS:
        made.step(1.0)
        require(
            made.min_lrs[0] < lr,
            f"min_lr {made.min_lrs[0]:g} is not below --lr {lr:g}, so the rate could never fall",
        )
        return [lr]
    places = sorted(
        {round(n * (steps - 1) / LOOKS) for n in range(LOOKS + 1)} | {min(warmup, steps - 1)}
    )
    return [lr * float(made.lr_lambdas[0](place)) for place in places]


def _said(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
