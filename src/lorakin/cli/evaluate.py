"""The command `lorakin evaluate`: prints the metrics of rows of data, and writes the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakin.cli.answering import MaxNewTokens
from lorakin.cli.options import (
    Dtype,
    Json,
    Model,
    OtherBase,
    console_for,
    examples,
    print_json,
)
from lorakin.cli.recipe_options import recipe_options
from lorakin.terminal import Terminal, labelled
from lorakin.training.recipe import DATA_HELP

if TYPE_CHECKING:
    from lorakin.training.tasks import Evaluation

EXAMPLES = examples(
    "lorakin evaluate --model smollm2 --adapter adapter --data held_out.jsonl",
    "lorakin evaluate --model smollm2 --data held_out.jsonl --json",
    "lorakin evaluate --model minilm --adapter a --adapter b --data held_out.jsonl",
    "lorakin evaluate --model minilm --adapter a --data held_out.jsonl --predictions answers.jsonl",
    "lorakin evaluate --model smollm2 --adapter a --base --data held_out.jsonl --generate",
)
BASE = "the base"

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        show_default=False,
        help="An adapter's directory or hub id; without one, the base alone. Several are "
        "compared with the first, row by row.",
    ),
]
Base = Annotated[
    bool, typer.Option("--base", help="Evaluate the base too, and compare the adapters with it.")
]
Predictions = Annotated[
    Path | None,
    typer.Option(
        show_default=False, help="A new JSONL file for what was answered beside what is right."
    ),
]
Generate = Annotated[
    bool,
    typer.Option(
        "--generate",
        help="Also write the answers, and compare them with all that the data has to a prompt: "
        "BLEU, chrF, ROUGE-L, exact match.",
    ),
]


@recipe_options("columns", "format", "chat_template", "quantize", "task", "task_args")
def command(
    model: Model,
    data: Annotated[
        list[str], typer.Option("--data", "-d", help=f"Rows to evaluate on. {DATA_HELP}")
    ],
    adapter: Adapters = None,
    base: Base = False,
    predictions: Predictions = None,
    generate: Generate = False,
    max_new_tokens: MaxNewTokens = 256,
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
    """Print the metrics of a data set, with 95 % intervals over its rows.

    They are loss and perplexity on the answers of a language model; accuracy, F1 and Matthews
    correlation of a classifier; Pearson and Spearman correlation of numbers. Several adapters are
    compared by a paired test on the same rows.
    """
    from lorakin.training import predictions as answers_file
    from lorakin.training.evaluate import evaluate_rows
    from lorakin.training.sampling import Sampling

    named: list[str | None] = list(adapter or ())
    adapters = [None, *named] if base or not named else named
    if predictions is not None:
        answers_file.check(predictions)
    layout = flags.pop("format", None)
    sampling = Sampling(max_new_tokens) if generate else None
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "max_length": max_length,
        "loss_on": loss_on,
    }
    settings |= {"dtype": dtype, "other_base": other_base, "sampling": sampling, **flags}
    found = [evaluate_rows(model, name, data, layout=layout, **settings) for name in adapters]
    if predictions is not None:
        answers_file.write(predictions, dict(zip(adapters, found, strict=True)))
    if as_json:
        print_json({"model": model, "data": data, **_figures(adapters, found)})
    else:
        _show(console_for(as_json), adapters, found)


def _figures(adapters: list[str | None], found: list[Evaluation]) -> dict[str, Any]:
    """Returns the figures of the first adapter; those of others beside it are under `others`."""
    from lorakin.training.paired import paired

    figures: dict[str, Any] = {"adapter": adapters[0], **found[0].as_dict()}
    if len(found) > 1:
        figures["others"] = [
            {"adapter": name, **one.as_dict(), **vars(paired(found[0], one))}
            for name, one in zip(adapters[1:], found[1:], strict=True)
        ]
    return figures


def _show(console: Terminal, adapters: list[str | None], found: list[Evaluation]) -> None:
    from lorakin.training.evaluate import described
    from lorakin.training.paired import paired
    from lorakin.training.predictions import confusions

    for note in dict.fromkeys(one.note for one in found if one.note):
        console.print(labelled("task  ", note))
    if len(found) == 1:
        console.print(described(found[0]))
        if (answer := found[0].only_answer) is not None:
            console.print(f"every row is answered {answer!r}: the figures are those of a constant")
        if (table := confusions(found[0])) is not None:
            console.print(table)
        return
    for name, one in zip(adapters, found, strict=True):
        console.print(labelled(f"{name or BASE}  ", described(one)))
    first = adapters[0] or BASE
    for name, one in zip(adapters[1:], found[1:], strict=True):
        console.print(labelled(f"{name} against {first}  ", str(paired(found[0], one))))
