"""Options that several commands share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from lorakin.errors import ModelError
from lorakin.terminal import Terminal
from lorakin.training.recipe import MODEL_HELP

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
AdapterDir = Annotated[
    str,
    typer.Option(
        "--adapter", "-a", help="An adapter's directory, lorakin's or PEFT's, or a hub id."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: the faster on this machine.")
]
MaybeModel = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"{MODEL_HELP} By default the one that the adapter names."),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Read what was written back, and compare it with the trained model.",
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        help="Tolerate a mean KL of so much, in nats, instead of what the precision explains."
    ),
]
OtherBase = Annotated[
    bool,
    typer.Option("--other-base", help="Also on a base with other weights than the adapter's own."),
]
MaybeAdapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="An adapter's directory or hub id; without it, the base."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on stdout, everything else on stderr."),
]

NoTemplate = Annotated[
    bool, typer.Option("--no-chat-template", help="Write prompts without a chat template.")
]


def console_for(as_json: bool) -> Terminal:
    """Returns where a command talks to the user: not on stdout if that holds JSON."""
    return Terminal(stderr=as_json)


def print_json(content: dict[str, Any]) -> None:
    """Prints the result on stdout, for scripts.

    Raises:
        ModelError: it holds NaN or infinity, for which JSON has no word.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        raise ModelError(
            "the result holds NaN or infinity, for which JSON has no word; look at it without "
            "--json"
        ) from None
    print(text)


def examples(*lines: str) -> str:
    """Returns the end of a command's help: commands to copy, one in each paragraph."""
    return "Examples:\n\n" + "\n\n".join(f"[cyan]{line}[/]" for line in lines)
