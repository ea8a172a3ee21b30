"""The command `lorakin stop`: asks a run that is at work to stop."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import console_for, examples

EXAMPLES = examples("lorakin stop adapter")


def command(
    run: Annotated[str, typer.Argument(metavar="DIR", help="The run's directory, its --out.")],
) -> None:
    """Stop a run after its current step, and keep what it has learned.

    It ends as if that step were its last: with held-out figures and an adapter, that of the best
    step with `--keep best`.
    """
    from lorakin.storage.paths import user_path
    from lorakin.training.requests import STOP, ask

    ask(user_path(run, "DIR"), STOP)
    console_for(False).print(f"{run} stops after its current step")
