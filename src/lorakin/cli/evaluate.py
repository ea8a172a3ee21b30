"""`lorakin evaluate`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import (
    DATA_HELP,
    Columns,
    Dtype,
    Json,
    Layout,
    MaybeAdapter,
    Model,
    NoTemplate,
    OtherBase,
    Quantize,
    TemplateFile,
    console_for,
    examples,
    print_json,
    template_of,
)

EXAMPLES = examples(
    "lorakin evaluate --model smollm2 --adapter adapter --data held_out.jsonl",
    "lorakin evaluate --model smollm2 --data held_out.jsonl --json",
)


def command(
    model: Model,
    data: Annotated[
        list[str], typer.Option("--data", "-d", help=f"Rows to evaluate on. {DATA_HELP}")
    ],
    adapter: MaybeAdapter = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 1024,
    loss_on: Annotated[str, typer.Option(help="answers, last or all, as for train.")] = "answers",
    columns: Columns = None,
    layout: Layout = None,
    chat_template: TemplateFile = None,
    no_chat_template: NoTemplate = False,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Loss and perplexity on the answers of a data set; loss and accuracy for a classifier."""
    from lorakin.training.evaluate import evaluate_rows
    from lorakin.training.recipe import parse_columns
    from lorakin.training.train import described

    console = console_for(as_json)
    figures = evaluate_rows(
        model,
        adapter,
        data,
        batch_size=batch_size,
        max_length=max_length,
        loss_on=loss_on,
        chat_template=True
        if (template := template_of(chat_template, no_chat_template)) is None
        else template,
        columns=parse_columns(columns or []),
        layout=layout,
        dtype=dtype,
        other_base=other_base,
        quantize=quantize,
    )
    if as_json:
        print_json({"model": model, "adapter": adapter, "data": data, **figures.as_dict()})
    else:
        console.print(described(figures))
