"""The part of a recipe that says where a run begins, how it is watched, and when it ends."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from lorakin.storage.schema import AtLeastOne, Check, NotNegative
from lorakin.training.recipe_option import DATA, METHOD, OPTIMISATION, WATCHING, Option

REPORTERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""What `--report-to` knows: transformers' words for them, which are also their packages'."""

Smoothing = Annotated[float, Check("a share in [0, 1)", lambda value: 0 <= value < 1)]
Reporters = Annotated[
    list[str],
    Check(
        f"some of {', '.join(REPORTERS)}", lambda names: all(name in REPORTERS for name in names)
    ),
]


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """Fields of `Recipe`: an adapter to start from, two regularisers, evaluation, reports."""

    adapter: Annotated[
        str | None,
        Option(
            METHOD,
            "An adapter to train further: a directory or hub id, lorakin's or PEFT's. Its files "
            "say the method, the rank and the modules.",
            default="a new one",
        ),
    ] = None
    task_args: Annotated[
        dict[str, Any],
        Option(
            DATA,
            "An argument of the task's own trainer, for dpo, orpo, kto and reward: beta=0.2.",
            ("--task-arg",),
        ),
    ] = dataclasses.field(default_factory=dict)
    neftune_alpha: Annotated[
        NotNegative,
        Option(OPTIMISATION, "NEFTune: noise of this size on the embeddings while training."),
    ] = 0.0
    label_smoothing: Annotated[
        Smoothing,
        Option(
            OPTIMISATION, "Share of a label's probability that is spread over all of its choices."
        ),
    ] = 0.0
    eval_every: Annotated[
        AtLeastOne | None,
        Option(WATCHING, "Steps between evaluations on the held-out rows.", default="at the end"),
    ] = None
    metric: Annotated[
        str | None,
        Option(
            WATCHING,
            "The held-out figure that decides which step is best.",
            default="the task's first metric; loss for a language model",
        ),
    ] = None
    keep: Annotated[
        Literal["last", "best"],
        Option(WATCHING, "Which step's adapter is kept: the last or the best one."),
    ] = "last"
    early_stopping: Annotated[
        AtLeastOne | None,
        Option(WATCHING, "Stop after so many evaluations without a better one.", default="no"),
    ] = None
    report_to: Annotated[
        Reporters, Option(WATCHING, f"Also log to: {', '.join(REPORTERS)}.", default="none")
    ] = dataclasses.field(default_factory=list)
