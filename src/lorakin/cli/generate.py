"""The command `lorakin generate`: answers a prompt, or a file of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakin.cli.answering import (
    Adapters,
    MaxNewTokens,
    NoChatTemplate,
    Seed,
    Stop,
    System,
    Temperature,
    TopP,
)
from lorakin.cli.options import Dtype, Json, Model, OtherBase, console_for, examples, print_json
from lorakin.cli.recipe_options import recipe_options
from lorakin.cli.verbosity import messages_on
from lorakin.terminal import visible
from lorakin.training.recipe import DATA_HELP

if TYPE_CHECKING:
    from lorakin.training.sampling import Sampling
    from lorakin.training.speakers import Speaker

EXAMPLES = examples(
    'lorakin generate --model smollm2 --adapter adapter --prompt "Write a haiku about rain."',
    "lorakin generate --model smollm2 --adapter adapter --prompt - < question.txt",
    'lorakin generate --model smollm2 --prompt "The base model alone" --temperature 0.7 --seed 1',
    'lorakin generate --model smollm2 --adapter a --adapter b --base --prompt "Who are you?"',
    "lorakin generate --model smollm2 --adapter adapter --prompts rows.jsonl --out answers.jsonl",
)


def _text(prompt: str) -> str:
    """Returns the prompt, from stdin if it is "-".

    Raises:
        DataError: it is not valid UTF-8.
    """
    from lorakin.errors import DataError

    try:
        if prompt == "-":
            stream = getattr(sys.stdin, "buffer", None)  # whatever the terminal's encoding is
            return sys.stdin.read() if stream is None else str(stream.read().decode("utf-8"))
        prompt.encode("utf-8")
    except UnicodeError:
        where = "on stdin" if prompt == "-" else "of --prompt"
        raise DataError(f"the prompt {where} is not valid UTF-8; convert it first") from None
    return prompt


Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The prompt; - reads it from stdin.")
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help=f"Rows to answer, with or without their answers: {DATA_HELP}"),
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="A new JSONL file: the rows of --prompts, answered."),
]
Base = Annotated[bool, typer.Option("--base", help="Show the base's answer beside the adapters'.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answers at a time.")]


@recipe_options("columns", "format", "quantize")
def command(
    model: Model,
    prompt: Prompt = None,
    prompts: Prompts = None,
    out: Out = None,
    adapter: Adapters = None,
    base: Base = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    batch_size: BatchSize = 8,
    no_chat_template: NoChatTemplate = False,
    dtype: Dtype = "auto",
    *,
    other_base: OtherBase = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Answer a prompt, or a file of prompts, with a model and its adapters.

    One answer is printed as it is generated. Answers of several adapters, and with --base of the
    base, stand below each other under their names. With --prompts and --out the rows are written
    with a column "generated"; an interrupted run goes on when it is started again.
    """
    from lorakin.training.answer_rows import answer_file, check_asked
    from lorakin.training.sampling import Sampling
    from lorakin.training.speakers import load_speakers

    check_asked(prompt, prompts, out)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, stop or [])
    loading: dict[str, Any] = {
        "base": base, "chat_template": not no_chat_template, "dtype": dtype,
        "other_base": other_base, "quantize": flags.pop("quantize", None),
    }  # fmt: skip
    if prompts is not None and out is not None:
        try:
            written = answer_file(
                model, adapter or [], prompts, out, sampling, batch_size=batch_size, system=system,
                columns=flags.get("columns"), layout=flags.get("format"), **loading,
            )  # fmt: skip
        except KeyboardInterrupt:
            messages_on(as_json).for_warnings.print(f"stopped; the same command goes on with {out}")
            raise
        if as_json:
            print_json(written)
        else:
            console_for(False).print(f"{written['rows']:,} rows, answered, in {written['out']}")
        return
    text = _text(str(prompt))
    speakers = load_speakers(model, adapter or [], **loading)
    _answer(speakers, text, sampling, system, as_json)


def _answer(
    speakers: list[Speaker], prompt: str, sampling: Sampling, system: str | None, as_json: bool
) -> None:
    from lorakin.training.answer_rows import answer_side_by_side
    from lorakin.training.generate import answer_of

    if len(speakers) == 1:
        reply = answer_of(speakers[0], prompt, sampling, system, stream=not as_json)
        if as_json:
            print_json({"prompt": prompt, "answer": reply})
        return
    said = answer_side_by_side(speakers, prompt, sampling, system)
    if as_json:
        print_json({"prompt": prompt, "answers": said})
        return
    for name, reply in said.items():
        console_for(False).print(f"── {name} ──", style="bold")
        print(visible(reply) if sys.stdout.isatty() else reply, end="\n\n")
