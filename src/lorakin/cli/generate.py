"""The command `lorakin generate`: answers a prompt with a model and its adapter."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lorakin.cli.options import (
    Dtype,
    Json,
    Model,
    OptionalAdapter,
    OtherBase,
    examples,
    print_json,
)
from lorakin.cli.recipe_options import recipe_options

EXAMPLES = examples(
    'lorakin generate --model smollm2 --adapter adapter --prompt "Write a haiku about rain."',
    "lorakin generate --model smollm2 --adapter adapter --prompt - < question.txt",
    'lorakin generate --model smollm2 --prompt "The base model alone" --temperature 0.7 --seed 1',
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


@recipe_options("quantize")
def command(
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The prompt; - reads it from stdin.")
    ],
    adapter: OptionalAdapter = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The most tokens of the answer.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0, max=1e4, help="Sampling temperature; 0 takes the likeliest token."),
    ] = 0.0,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Write prompts without a chat template.")
    ] = False,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the samples, if --temperature > 0.")] = 0,
    *,
    other_base: OtherBase = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Answer a prompt with a model and an adapter; the answer is printed as it is generated."""
    from lorakin.training.generate import answer
    from lorakin.training.with_adapter import load_with_adapter

    text = _text(prompt)
    loaded = load_with_adapter(model, adapter, dtype, other_base=other_base, **flags)
    reply = answer(
        loaded,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat_template=not no_chat_template,
        seed=seed,
        stream=not as_json,
    )
    if as_json:
        print_json({"prompt": text, "answer": reply})
