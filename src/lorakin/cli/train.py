"""The command `lorakin train`: reads options and a recipe, runs the training, prints the result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakin.cli.options import Json, console_for, examples, print_json
from lorakin.cli.recipe_options import recipe_options
from lorakin.cli.verbosity import messages_on
from lorakin.terminal import Terminal, labelled
from lorakin.terminal import command as shell_command
from lorakin.training.recipe_option import DEVICES, OUTPUT
from lorakin.training.recipe_words import ALL_FIELDS

if TYPE_CHECKING:
    from lorakin.training.train import Result

EXAMPLES = examples(
    "lorakin train --model smollm2 --data rows.jsonl --steps 100 --out adapter",
    "lorakin train --model org/model --data rows.parquet --rank 8 --targets q_proj,v_proj "
    "--epochs 3 --out adapter",
    "lorakin train --model smollm2 --data rows.jsonl --method dora,lora+ --set ratio=8 "
    "--out adapter",
    "lorakin train --model org/model --data rows.jsonl --quantize nf4 --gradient-checkpointing "
    "--out adapter",
    "lorakin train recipe.yaml --lr 1e-4 --out another",
    "lorakin train --model org/model --data rows.jsonl --gpus all --fsdp --out adapter",
    "lorakin train --resume --out adapter",
)
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume an interrupted run in --out.", rich_help_panel=OUTPUT),
]
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|all",
        help="Train on so many GPUs, with a process on each.",
        rich_help_panel=DEVICES,
    ),
]
Fsdp = Annotated[
    bool,
    typer.Option("--fsdp", help="Shard the base over the GPUs (FSDP2).", rich_help_panel=DEVICES),
]
Zero = Annotated[
    int | None,
    typer.Option(
        "--zero",
        metavar="STAGE",
        help="DeepSpeed's ZeRO, stage 1, 2 or 3; 3 shards the base over the GPUs.",
        rich_help_panel=DEVICES,
    ),
]


@recipe_options(*ALL_FIELDS, grouped=True)
def command(
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML recipe; flags win over it.", show_default=False)
    ] = None,
    *,
    resume: Resume = False,
    gpus: Gpus = None,
    fsdp: Fsdp = False,
    zero: Zero = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on your data and save the adapter.

    The data's format (messages, sharegpt, alpaca, prompt/completion, squad, classification, text)
    is detected and shown. The effective recipe is saved with the adapter.
    """
    from lorakin.training import launching, processes
    from lorakin.training import train as training
    from lorakin.training.recipe_file import read_recipe
    from lorakin.training.run_directory import RECIPE, resumed_recipe

    if (count := launching.wanted(gpus, fsdp, zero)) is not None:
        raise typer.Exit(launching.launch(count, fsdp, zero, sys.argv[1:]))
    console = messages_on(as_json) if processes.is_first() else Terminal(quiet=True)
    effective = resumed_recipe(recipe, flags) if resume else read_recipe(recipe, flags)
    if resume and not (Path(effective.out) / RECIPE).is_file():
        console.print(f"there is no run in {effective.out} to resume, so a new one begins")
    try:
        result = training.train(training.prepare(effective, console, resume))
    except KeyboardInterrupt:
        if (Path(effective.out) / RECIPE).is_file():
            resuming = shell_command("lorakin", "train", "--resume", "--out", effective.out)
            console.for_warnings.print(f"stopped; resume with: {resuming}")
        raise
    if not processes.is_first():
        return
    if as_json:
        print_json(result.as_dict())
    else:
        _show(console_for(False), result)


def _show(console: Terminal, result: Result) -> None:
    from lorakin.training.evaluate import described
    from lorakin.training.run_directory import METRICS, PICTURE, RECIPE

    console.print(labelled("held out after   ", described(result.after)))
    out = result.out
    line = (
        f"{out} ({result.adapter_bytes / 2**20:.1f} MiB, "
        f"{result.trainable_parameters:,} trained parameters); "
        f"{out / PICTURE}, {out / METRICS}, {out / RECIPE}"
    )
    console.print(labelled("adapter  ", line))
