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

    console.print(labelled("data    ", f"{found.name}: {found.summary}"))
    console.print(labelled("task    ", found.task))
    shortest, median, high, longest = found.quantiles()
    what, counted = "row", f"{found.rows:,} rows"
    if len(found.lengths) > found.rows:
        what, counted = "text", f"{len(found.lengths):,} texts of {found.rows:,} rows"
    console.print(
        labelled(
            "tokens  ",
            f"{sum(found.lengths):,} in {counted}, {found.learned:,} learned; a {what} has "
            f"{shortest} to {longest}, half at most {median}, 95 % at most {high}",
        )
    )
    table = Table("tokens", f"{what}s", "", box=SIMPLE, padding=(0, 1, 0, 0))
    bins = histogram(found.lengths, found.max_length)
    most = max(count for _, count in bins)
    for name, count in bins:
        table.add_row(name, f"{count:,}", "█" * round(BAR * count / most))
    console.print(table)
    for line in found.epoch.lines():
        console.print(labelled("epoch   ", visible(line)))
    for count, what in (
        (found.cut, f"rows are cut at {found.max_length} tokens: their last answers do not end"),
        (found.dropped, f"rows have nothing to learn within {found.max_length} tokens"),
        (found.doubled, "rows stand there before, token by token"),
        (found.held_out[1], f"of {found.held_out[0]:,} held-out rows are trained on, too"),
    ):
        if count:
            console.print(labelled(f"{count:,} ", what, "yellow"))
    if found.unused is not None:
        console.print(labelled("", visible(found.unused), "yellow"))
    for example in found.examples:
        console.print(labelled("example ", ""))
        console.print(example)
