"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lorakin.errors import ModelError, SettingError
from lorakin.terminal import Terminal

FORMATS = ("messages", "sharegpt", "alpaca", "prompt/completion", "squad", "classification", "text")
"""Those of `lorakin.training.formats`, which takes seconds to import."""
MODEL_HELP = "A hub id, a model's directory, a .gguf file, or the packaged smollm2 or minilm."
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

BatchSize = Annotated[int | None, typer.Option(help="Rows at a time. [default: 8]")]
Accumulate = Annotated[int | None, typer.Option(help="Batches per optimizer step. [default: 1]")]
MaxLength = Annotated[
    int | None, typer.Option(help="Tokens per row; longer rows are cut. [default: 1024]")
]
LossOn = Annotated[
    str | None,
    typer.Option(
        help="answers: all turns of the assistant; last: the last one; all: every token. [default: answers]"
    ),
]
DATA_HELP = "A .jsonl, .json, .csv, .tsv, .txt or .parquet file, perhaps .gz; or a hub data set, as org/set:split."
Columns = Annotated[
    list[str] | None,
    typer.Option(
        help="Which columns are meant: prompt=question,completion=reply. Others are left aside."
    ),
]
Layout = Annotated[
    str | None,
    typer.Option("--format", help=f"What rows are: {', '.join(FORMATS)}. [default: detected]"),
]
TemplateFile = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        help="A file with another chat template than the model's, or alpaca.",
        show_default=False,
    ),
]
NoTemplate = Annotated[
    bool,
    typer.Option("--no-chat-template", help="Write prompts as they are, without a chat template."),
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option("--template-arg", help="A variable of the chat template: enable_thinking=false."),
]
Schedule = Annotated[
    str | None,
    typer.Option(help="Of the learning rate: cosine, linear, constant … [default: cosine]"),
]
ScheduleArgs = Annotated[
    list[str] | None,
    typer.Option("--schedule-arg", help="What a schedule needs or can have, as min_lr=1e-5."),
]
RecipeDtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16, auto. [default: auto]")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Keep the base's linear layers in few bits: nf4, int8, torchao-int8. [default: no]"
    ),
]
RankAbove = Annotated[
    str | None,
    typer.Option(
        help="A rank above a weight's smaller side: refuse, or clamp it to that for such modules. [default: refuse]"
    ),
]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory, more time. [default: no]",
    ),
]
Fuse = Annotated[
    bool | None,
    typer.Option(
        "--fuse/--no-fuse",
        help="Norms, activations, loss in less memory (Llama-like models). [default: no]",
    ),
]


def parts(texts: Sequence[str] | None) -> list[str]:
    """ "q_proj,v_proj" as two names; a regular expression with a comma in braces stays whole."""
    split = ([text] if "{" in text else text.split(",") for text in texts or [])
    return [part.strip() for several in split for part in several if part.strip()]


def template_of(file: str | None, none: bool) -> bool | str | None:
    """The recipe's `chat_template` that the two options say; None if neither was given.

    Raises:
        SettingError: both were.
    """
    if file is not None and none:
        raise SettingError(
            "--chat-template and --no-chat-template contradict each other; give one of them"
        )
    return False if none else file


def console_for(as_json: bool) -> Terminal:
    """Where a command talks to the user: not on stdout if that is to hold JSON."""
    return Terminal(stderr=as_json)


def print_json(content: dict[str, Any]) -> None:
    """The result on stdout, for scripts.

    Raises:
        ModelError: it holds NaN or infinity, for which JSON has no word.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        raise ModelError(
            "the result holds NaN or infinity, for which JSON has no word; look at it without --json"
        ) from None
    print(text)


def examples(*lines: str) -> str:
    """The end of a command's help: commands to copy, one a paragraph."""
    return "Examples:\n\n" + "\n\n".join(f"[cyan]{line}[/]" for line in lines)
