"""The command `lorakin plan`: predicts memory and time of a run before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from lorakin.cli.options import Json, Model, console_for, examples, print_json
from lorakin.cli.recipe_options import recipe_options
from lorakin.terminal import Terminal, labelled
from lorakin.training.recipe_words import defaults
from lorakin.waiting import waiting

if TYPE_CHECKING:
    from lorakin.plan.advice import Advice

EXAMPLES = examples(
    "lorakin plan --model smollm2",
    "lorakin plan --model org/model --methods 'lora dora dora,lora+' --rank 32 --batch-size 4 "
    "--memory 24GB",
    "lorakin plan --model org/model --device cuda --dtype bfloat16 --fuse --json",
    "lorakin plan --model minilm --task token-classification --labels 9 --max-length 128",
)


METHODS_HELP = "all, or methods with spaces between: 'dora vera dora,lora+'. \\[default: all]"
RANK_HELP = (
    "Rank of plain LoRA; the other methods get a comparable size. \\[default: each method's own]"
)
SET_HELP = "Any other setting, for the methods that have it, such as dropout=0.1."
LENGTH_HELP = (
    "Tokens per row; all rows are planned with this length. "
    "\\[default: 1024, or what the model can take]"
)
DEVICE_HELP = "cpu or cuda. \\[default: what lorakin train would take]"
OF_A_RECIPE = (
    "task", "targets", "exclude", "layers", "modules_to_save", "rank_above", "batch_size",
    "accumulate", "packing", "gradient_checkpointing", "fuse", "dtype", "quantize",
)  # fmt: skip


@recipe_options(*OF_A_RECIPE)
def command(
    model: Model,
    methods: Annotated[
        list[str] | None, typer.Option("--methods", "--method", help=METHODS_HELP)
    ] = None,
    rank: Annotated[int | None, typer.Option(help=RANK_HELP)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    labels: Annotated[
        int | None,
        typer.Option(
            help="Number of classes, to plan a classifier instead of a language model; 1 for "
            "regression. --task says which kind of classifier."
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help=LENGTH_HELP)] = None,
    steps: Annotated[
        int, typer.Option(help="Optimizer steps, for members that plan over the run.")
    ] = 1000,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory available, such as 24GB. \\[default: what is free]")
    ] = None,
    *,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Predict memory and time of training, before anything is downloaded or trained.

    For each method: trainable parameters, adapter, optimizer, activations, peak memory and time of
    a step, whether it fits, and what would make it fit. Of a hub id only the config is fetched.
    """
    from lorakin.plan.advice import advise

    with waiting("rehearsing a step of each method"):
        advice = advise(
            model, methods, rank, settings, labels=labels, max_length=max_length, steps=steps,
            device=device, memory=memory, **(defaults(*OF_A_RECIPE) | flags),
        )  # fmt: skip
    if as_json:
        print_json(advice.as_dict())
        return
    show(advice, console_for(as_json))


def show(advice: Advice, console: Terminal) -> None:
    """Prints the table, and what follows from it."""
    from lorakin.plan.table import TITLES, cells_of

    console.print(labelled("model  ", advice.headline))
    console.print(labelled("memory ", advice.memory_line))
    first, *others = TITLES
    table = Table(Column(first, no_wrap=True), box=SIMPLE, padding=(0, 1, 0, 0))
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    for cells in cells_of(advice):
        table.add_row(*cells)
    console.print(table)
    for line in advice.lines():
        console.print(line)
