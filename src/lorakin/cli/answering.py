"""Options of the commands that answer: `generate` and `chat`."""

from __future__ import annotations

from typing import Annotated

import typer

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="An adapter's directory or hub id; may be given several times. Without it, the base.",
    ),
]
System = Annotated[str | None, typer.Option("--system", help="The system's message.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
Temperature = Annotated[
    float,
    typer.Option(min=0, max=1e4, help="Sampling temperature; 0 takes the likeliest token."),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", help="Sample from the likeliest tokens that have this probability together."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the samples, if --temperature > 0.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="A text that ends the answer; may be given several times."),
]
NoChatTemplate = Annotated[
    bool, typer.Option("--no-chat-template", help="Write prompts without a chat template.")
]
