"""`lorakin compare`"""

from __future__ import annotations

from typing import Annotated, Any

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

EXAMPLES = examples(
    "lorakin compare --model smollm2 --data rows.jsonl --budget steps=200 --out comparison",
    "lorakin compare --model smollm2 --data rows.jsonl --methods 'dora vera dora,adalora' --seeds 5 --out comparison",
    "lorakin compare --model org/model --data rows.parquet --budget minutes=10,params=2m --devices cuda:0,cuda:1 --out runs",
)


def command(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)],
    data: Annotated[str, typer.Option("--data", "-d", help=DATA_HELP)],
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="A directory: a new one, or one where a comparison was interrupted."
        ),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="all, or methods with spaces between: 'dora vera dora,lora+'. [default: all]"
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Of each trial: steps=… or minutes=…; and params=…, the most that may be trained."
        ),
    ] = "steps=200",
    seeds: Annotated[int, typer.Option(help="Runs of each method at its best learning rate.")] = 3,
    lr_sweep: Annotated[
        str, typer.Option(help="auto: half decades around each method's own; or rates, 1e-4,3e-4.")
    ] = "auto",
    devices: Annotated[
        str,
        typer.Option(
            help="Where trials run, one at a time on each: cuda:0,cuda:1 or cpu,cpu. auto: all cards or the CPU."
        ),
    ] = "auto",
    eval_data: Annotated[
        str | None, typer.Option(help="Rows to report on. [default: split off the data]")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="At which methods are compared. [default: 16]")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Scale is alpha/rank, the same for all. [default: 2 × rank]"),
    ] = None,
    dropout: Annotated[float, typer.Option(help="For those that can have it.")] = 0.0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, for the methods that have it, as ratio=8."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="As for lorakin train. [default: all-linear]")
    ] = None,
    rank_above: RankAbove = None,
    batch_size: BatchSize = None,
    accumulate: Accumulate = None,
    max_length: MaxLength = None,
    loss_on: LossOn = None,
    columns: Columns = None,
    layout: Layout = None,
    chat_template: TemplateFile = None,
    no_chat_template: NoTemplate = False,
    template_args: TemplateArgs = None,
    schedule: Schedule = None,
    schedule_args: ScheduleArgs = None,
    gradient_checkpointing: Checkpointing = None,
    fuse: Fuse = None,
    dtype: RecipeDtype = None,
    as_json: Json = False,
) -> None:
    """Which method, on this model and data? Each under one budget, its learning rate tuned, over several seeds.

    Plain LoRA, the methods, and controls that tell what a difference comes from. Every trial is one row in results.jsonl;
    the same command goes on where a killed one was. The answer is report.html, which opens in any browser.
    """
    from lorakin.compare import workers
    from lorakin.compare.comparison import Comparison
    from lorakin.compare.directory import REPORT, locked
    from lorakin.compare.preparation import prepare
    from lorakin.compare.progress import Board
    from lorakin.compare.study import check_ran
    from lorakin.family.words import methods_of
    from lorakin.report import comparison_page
    from lorakin.training.recipe import parse_columns, parse_settings

    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "accumulate": accumulate,
        "max_length": max_length,
        "loss_on": loss_on,
        "columns": parse_columns(columns or []) or None,
        "format": layout,
        "chat_template": template_of(chat_template, no_chat_template),
        "template_args": parse_settings(template_args or [], "--template-arg") or None,
        "schedule": schedule,
        "schedule_args": parse_settings(schedule_args or [], "--schedule-arg") or None,
        "gradient_checkpointing": gradient_checkpointing,
        "fuse": fuse,
        "dtype": dtype,
        "targets": parts(targets) or None,
        "rank_above": rank_above,
    }
    console = console_for(as_json)
    comparison = Comparison(
        model=model,
        data=data,
        out=out,
        methods=methods_of(" ".join(methods or ["all"])),
        budget=budget,
        seeds=seeds,
        sweep=lr_sweep,
        eval_data=eval_data,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        settings=parse_settings(settings or []),
        recipe={name: value for name, value in shared.items() if value is not None},
    )
    places = workers.devices_of(devices)
    with locked(comparison):
        study = prepare(comparison, console)
        try:
            with Board(console, len(places)) as board:
                workers.run(study, places, board)
        finally:
            findings = (
                comparison_page.write(study)
                if study.results.rows
                else comparison_page.findings(study)
            )
    check_ran(study)
    if as_json:
        print_json(findings.as_dict())
        return
    for sentence in findings.verdict:
        console.print(sentence.replace("**", ""))
    console.print(f"the report: {study.out / REPORT}")
