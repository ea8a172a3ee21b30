"""`lorakin plan`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from lorakin.cli.options import Json, Model, console_for, examples, parts, print_json
from lorakin.terminal import Terminal, labelled

if TYPE_CHECKING:
    from lorakin.plan.advice import Advice
    from lorakin.plan.prediction import Plan

EXAMPLES = examples(
    "lorakin plan --model smollm2",
    "lorakin plan --model org/model --method 'lora dora dora,lora+' --rank 32 --batch-size 4 --memory 24GB",
    "lorakin plan --model org/model --device cuda --dtype bfloat16 --fuse --json",
)


def command(
    model: Model,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="all, or methods with spaces between: 'dora vera dora,lora+'. [default: all]"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Of plain LoRA, the others at a fair size beside it. [default: each method's own]"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting, for the methods that have it, as dropout=0.1."
        ),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="As for lorakin train. [default: all-linear]")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Modules to leave out.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only in these layers, such as 0-3,8,-1.")
    ] = None,
    modules_to_save: Annotated[
        list[str] | None, typer.Option(help="Modules to train whole.")
    ] = None,
    rank_above: Annotated[
        str, typer.Option(help="As for lorakin train: refuse or clamp.")
    ] = "refuse",
    labels: Annotated[
        int | None, typer.Option(help="Classes: plan a classifier instead of a language model.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per row; all rows are planned as long as that. [default: 1024, or what the model can take]"
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Optimizer steps, for members that plan over the run.")
    ] = 1000,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    fuse: Annotated[
        bool,
        typer.Option("--fuse", help="Norms, activations, loss in less memory (Llama-like models)."),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, float16, base, or auto, as lorakin train takes it."),
    ] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="nf4, int8, torchao-int8: the base's linear layers in few bits, by arithmetic alone."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: what lorakin train would take]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What there is, as 24GB. [default: what is free here]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what training would take, before anything is downloaded or trained: of a hub id only the config is fetched.

    Trainable parameters, adapter, optimizer, activations, peak memory and time of a step for each method, whether it fits, and
    what would make it fit.
    """
    from lorakin.plan.advice import advise

    asked = {name: value for name, value in locals().items() if name not in ("as_json", "advise")}
    console = console_for(as_json)
    for name in ("targets", "exclude", "modules_to_save"):
        asked[name] = parts(asked[name])
    advice = advise(**asked)
    if as_json:
        print_json(advice.as_dict())
        return
    show(advice, console)


def show(advice: Advice, console: Terminal) -> None:
    """The table and what follows from it."""
    console.print(labelled("model  ", advice.headline))
    console.print(labelled("memory ", advice.memory_line))
    table = Table(Column("method", no_wrap=True), box=SIMPLE, padding=(0, 1, 0, 0))
    for title in ("rank", "trained", "adapter", "optimizer", "activ.", "peak", "step ×", "fits"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in advice.rows:
        if row.plan is not None:
            table.add_row(*_cells(row.plan, row.fits))
    console.print(table)
    for line in advice.lines():
        console.print(line)


def _cells(plan: Plan, fits: bool | None) -> list[str]:
    from lorakin.plan.memory import size

    return [
        plan.method + ("*" if plan.supposed else ""),
        "" if plan.rank is None else str(plan.rank),
        f"{plan.trainable_parameters:,}",
        size(plan.adapter_bytes),
        size(plan.optimizer_bytes),
        size(plan.activation_bytes),
        size(plan.peak),
        f"{plan.step:.2f}",
        {True: "✔", False: "✗", None: "?"}[fits],
    ]
