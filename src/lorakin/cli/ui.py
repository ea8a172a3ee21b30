"""The command `lorakin ui`: one local page over the functions of the command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lorakin.cli.options import console_for, examples

EXAMPLES = examples(
    "lorakin ui",
    "lorakin ui --runs runs --port 8000",
    "lorakin ui --host 0.0.0.0 --password 'a long one'",
)
HOST_HELP = "Where the page listens. Any address but loopback needs --password."
PORT_HELP = "The port. \\[default: 7860, or the next that is free]"
PASSWORD_HELP = "What a browser must know; the user's name may be anything."
RUNS_HELP = "The directory where run directories are listed and made."
NOT_INSTALLED = "lorakin ui needs gradio; install it with: pip install 'lorakin[ui]'"


def command(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help=PORT_HELP)] = None,
    host: Annotated[str, typer.Option(help=HOST_HELP)] = "127.0.0.1",
    password: Annotated[
        str | None, typer.Option(envvar="LORAKIN_PASSWORD", help=PASSWORD_HELP)
    ] = None,
    runs: Annotated[Path, typer.Option(help=RUNS_HELP)] = Path(),
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Do not open a browser.")
    ] = False,
) -> None:
    """Open a page to prepare data, plan, train, look, compare and export.

    What is started there is a process of its own with a run directory: it goes on when the page is
    closed, and `lorakin ui`, started again, shows it. Runs of the command line are shown, too.
    """
    from lorakin.errors import SettingError
    from lorakin.ui.server import serve

    if importlib.util.find_spec("gradio") is None:
        raise SettingError(NOT_INSTALLED)
    console = console_for(False)

    def ready(address: str) -> None:
        console.print(f"lorakin ui: {address} (Ctrl-C ends it; what it started goes on)")

    serve(runs, host, port, password, ready, opens_browser=not no_browser)
