"""The command `lorakin pause`: asks a run that is at work to pause."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import console_for, examples

EXAMPLES = examples("lorakin pause adapter")


def command(
    run: Annotated[str, typer.Argument(metavar="DIR", help="The run's directory, its --out.")],
) -> None:
    """Pause a run: it writes a checkpoint after its current step, and ends.

    `lorakin train --resume` continues it, to the same bits. Ctrl-C ends a run at once instead, and
    loses the steps since its last checkpoint.
    """
    from lorakin.storage.paths import user_path
    from lorakin.training.requests import PAUSE, ask

    ask(user_path(run, "DIR"), PAUSE)
    console_for(False).print(f"{run} pauses after its current step")
