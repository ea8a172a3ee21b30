"""The command `lorakin evaluate`: prints loss and perplexity, or accuracy, on rows of data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorakin.cli.options import (
    Dtype,
    Json,
    Model,
    OptionalAdapter,
    OtherBase,
    console_for,
    examples,
    print_json,
)
from lorakin.cli.recipe_options import recipe_options
from lorakin.training.recipe import DATA_HELP

EXAMPLES = examples(
    "lorakin evaluate --model smollm2 --adapter adapter --data held_out.jsonl",
    "lorakin evaluate --model smollm2 --data held_out.jsonl --json",
)


@recipe_options("columns", "format", "chat_template", "quantize")
def command(
    model: Model,
    data: Annotated[
        list[str], typer.Option("--data", "-d", help=f"Rows to evaluate on. {DATA_HELP}")
    ],
    adapter: OptionalAdapter = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    max_length: Annotated[
        int, typer.Option(min=2, help="Tokens per row; longer rows are cut.")
    ] = 1024,
    loss_on: Annotated[str, typer.Option(help="answers, last or all, as for train.")] = "answers",
    dtype: Dtype = "auto",
    *,
    other_base: OtherBase = False,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Print loss and perplexity on the answers of a data set.

    For a classifier, loss and accuracy.
    """
    from lorakin.training.evaluate import described, evaluate_rows

    figures = evaluate_rows(
        model, adapter, data, batch_size=batch_size, max_length=max_length, loss_on=loss_on,
        dtype=dtype, other_base=other_base, layout=flags.pop("format", None), **flags,
    )  # fmt: skip
    if as_json:
        print_json({"model": model, "adapter": adapter, "data": data, **figures.as_dict()})
    else:
        console_for(as_json).print(described(figures))
