"""The command `lorakin data`: shows what training would make of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Table

from lorakin.cli.options import Json, Model, console_for, examples, print_json
from lorakin.cli.recipe_options import recipe_options
from lorakin.terminal import Terminal, labelled, visible

if TYPE_CHECKING:
    from lorakin.training.preview import Preview

EXAMPLES = examples(
    "lorakin data rows.jsonl --model smollm2",
    "lorakin data train.jsonl more.jsonl --model org/model --eval-data test.jsonl --max-length 512",
)
OF_A_RECIPE = (
    "max_rows", "data_weights", "columns", "format", "task", "task_args", "eval_data",
    "holdout", "seed",
    "max_length", "loss_on", "chat_template", "template_args", "batch_size", "accumulate",
    "group_by_length", "packing",
)  # fmt: skip
BAR = 30


@recipe_options(*OF_A_RECIPE)
def command(
    data: Annotated[
        list[str], typer.Argument(help="Files or hub data sets, as for train.", show_default=False)
    ],
    model: Model,
    *,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Show what training would make of data: format, task, lengths, lost rows, three examples.

    Only the model's tokenizer and config are read, so it takes seconds. Rows that training would
    refuse are refused here, with the row and the reason.
    """
    from lorakin.training.preview import preview, recipe_for

    found = preview(recipe_for(model, data, **flags))
    if as_json:
        print_json(found.as_dict())
    else:
        _show(console_for(as_json), found)


def _show(console: Terminal, found: Preview) -> None:
    from lorakin.training.preview import histogram

    for label, fact in found.facts():
        console.print(labelled(f"{label:<8}", visible(fact)))
    table = Table("tokens", f"{found.counted}s", "", box=SIMPLE, padding=(0, 1, 0, 0))
    bins = histogram(found.lengths, found.max_length)
    most = max(count for _, count in bins)
    for name, count in bins:
        table.add_row(name, f"{count:,}", "█" * round(BAR * count / most))
    console.print(table)
    for line in found.epoch.lines():
        console.print(labelled("epoch   ", visible(line)))
    for trouble in found.troubles():
        console.print(labelled("", visible(trouble), "yellow"))
    for example in found.examples:
        console.print(labelled("example ", ""))
        console.print(example)
