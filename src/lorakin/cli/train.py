"""`lorakin train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakin.cli.options import (
    DATA_HELP,
    MODEL_HELP,
    Accumulate,
    BatchSize,
    Checkpointing,
    Columns,
    Fuse,
    Json,
    Layout,
    LossOn,
    MaxLength,
    NoTemplate,
    Quantize,
    RankAbove,
    RecipeDtype,
    Schedule,
    ScheduleArgs,
    TemplateArgs,
    TemplateFile,
    console_for,
    examples,
    parts,
    print_json,
    template_of,
)
from lorakin.terminal import Terminal, labelled
from lorakin.terminal import command as words

EXAMPLES = examples(
    "lorakin train --model smollm2 --data rows.jsonl --steps 100 --out adapter",
    "lorakin train --model org/model --data rows.parquet --rank 8 --targets q_proj,v_proj --epochs 3 --out adapter",
    "lorakin train --model smollm2 --data rows.jsonl --method dora,lora+ --set ratio=8 --out adapter",
    "lorakin train --model org/model --data rows.jsonl --quantize nf4 --gradient-checkpointing --out adapter",
    "lorakin train recipe.yaml --lr 1e-4 --out another",
    "lorakin train --resume --out adapter",
)


def command(
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML recipe; flags win over it.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help=f"{DATA_HELP} May be given several times."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="A new directory for the adapter.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A member of the family, or several: dora,lora+. See lorakin methods. [default: lora]"
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="[default: the method's own, 16 for lora]")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Scale is alpha/rank. [default: the method's own, 32 for lora]"),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Dropout of the adapter's input. [default: 0]")
    ] = None,
    rslora: Annotated[
        bool | None,
        typer.Option("--rslora/--no-rslora", help="Scale by alpha/√rank. [default: no]"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting of the method, as ratio=8; lorakin methods lists them."
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, globs, regular expressions; none: the head alone. [default: all-linear]"
        ),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Modules to leave out.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only in these layers, such as 0-3,8,-1.")
    ] = None,
    modules_to_save: Annotated[
        list[str] | None, typer.Option(help="Modules to train whole.")
    ] = None,
    rank_above: RankAbove = None,
    trainable_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens, or their ids, whose rows in the embedding and the head are trained."
        ),
    ] = None,
    bias: Annotated[
        str | None,
        typer.Option(
            help="Biases to train: none, lora_only (of the adapted modules) or all. [default: none]"
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out rows. [default: split off the data]")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option(help="Share to hold out, at most 256 rows. [default: 0.1]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", "--learning-rate", help="[default: the method's own, 2e-4 for lora]"),
    ] = None,
    schedule: Schedule = None,
    schedule_args: ScheduleArgs = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps. [default: 0.05]")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: 0]")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="[default: 1]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. [default: one epoch]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    max_length: MaxLength = None,
    loss_on: LossOn = None,
    columns: Columns = None,
    layout: Layout = None,
    chat_template: TemplateFile = None,
    no_chat_template: NoTemplate = False,
    template_args: TemplateArgs = None,
    gradient_checkpointing: Checkpointing = None,
    fuse: Fuse = None,
    dtype: RecipeDtype = None,
    quantize: Quantize = None,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints, 0: none. [default: a fifth of the run]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on your data and save the adapter.

    The data's format (messages, sharegpt, alpaca, prompt/completion, squad, classification, text) is detected and shown.
    The effective recipe is written beside the adapter.
    """
    not_of_a_recipe = ("recipe", "resume", "as_json", "no_chat_template", "layout")
    flags = {
        name: value
        for name, value in locals().items()
        if name not in (*not_of_a_recipe, "not_of_a_recipe")
    }
    flags |= {"format": layout, "chat_template": template_of(chat_template, no_chat_template)}
    for name in ("targets", "exclude", "modules_to_save", "trainable_tokens"):
        flags[name] = parts(flags[name])
    from lorakin.training import processes
    from lorakin.training import train as training
    from lorakin.training.recipe import parse_columns, parse_settings, read_recipe

    flags["settings"] = parse_settings(settings or [])
    flags["columns"] = parse_columns(columns or [])
    flags["template_args"] = parse_settings(template_args or [], "--template-arg")
    flags["schedule_args"] = parse_settings(schedule_args or [], "--schedule-arg")
    flags["method"] = ",".join(method) if method else None

    console = console_for(as_json) if processes.is_first() else Terminal(quiet=True)
    effective = training.resumed_recipe(recipe, flags) if resume else read_recipe(recipe, flags)
    try:
        result = training.train(training.prepare(effective, console, resume))
    except KeyboardInterrupt:
        if (Path(effective.out) / training.RECIPE).is_file():
            console.print(
                f"stopped; go on with: {words('lorakin', 'train', '--resume', '--out', effective.out)}"
            )
        raise
    if as_json:
        if processes.is_first():
            print_json(result.as_dict())
        return
    where = result.out
    console.print(labelled("held out after   ", training.described(result.after)))
    said = (
        f"{where} ({result.adapter_bytes / 2**20:.1f} MiB, "
        f"{result.trainable_parameters:,} trained parameters); "
        f"{where / training.PICTURE}, {where / training.METRICS}, {where / training.RECIPE}"
    )
    console.print(labelled("adapter  ", said))
