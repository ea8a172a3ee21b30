"""Options that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakin.errors import ModelError, SettingError
from lorakin.terminal import Terminal
from lorakin.training.recipe import DTYPE_HELP, MODEL_HELP

ADAPTER_HELP = "An adapter's directory, lorakin's or PEFT's, or a hub id."

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
AdapterArgument = Annotated[
    str | None,
    typer.Argument(metavar="ADAPTER", help=f"{ADAPTER_HELP} It may also be given as --adapter."),
]
AdapterOption = Annotated[str | None, typer.Option("--adapter", "-a", help="The same as ADAPTER.")]
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"{MODEL_HELP} By default the one that the adapter names."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Read the result back, and compare it with the trained model.",
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        help="Largest mean KL to accept, in nats; by default it follows from the precision."
    ),
]
OtherBase = Annotated[
    bool,
    typer.Option(
        "--other-base",
        help="Accept a base whose weights differ from the one the adapter was trained on.",
    ),
]
OptionalAdapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="An adapter's directory or hub id; without it, the base."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on stdout, everything else on stderr."),
]


def chosen_adapter(argument: str | None, option: str | None) -> str:
    """Returns the adapter that the user gave as ADAPTER or as --adapter.

    >>> chosen_adapter(None, "runs/1")
    'runs/1'

    Raises:
        SettingError: it is given as neither, or as both.
    """
    if argument is not None and option is not None:
        raise SettingError(
            f"the adapter is given twice, as {argument!r} and as --adapter {option!r}; give one"
        )
    adapter = option if argument is None else argument
    if adapter is None:
        raise SettingError("ADAPTER is missing; give an adapter's directory or hub id")
    return adapter


def console_for(as_json: bool) -> Terminal:
    """Returns the console for messages to the user: stderr if stdout holds JSON, else stdout."""
    return Terminal(stderr=as_json)


def print_json(content: dict[str, Any]) -> None:
    """Prints the result on stdout, for scripts.

    Raises:
        ModelError: it holds NaN or infinity, which JSON cannot hold.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        raise ModelError(
            "the result holds NaN or infinity, which JSON cannot hold; run the command without "
            "--json"
        ) from None
    print(text)


def examples(*lines: str) -> str:
    """Returns the end of a command's help: commands to copy, one in each paragraph."""
    return "Examples:\n\n" + "\n\n".join(f"[cyan]{line}[/]" for line in lines)
