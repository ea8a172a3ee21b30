"""The command `lorakin compare`: trains each method under one budget, and writes a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakin.cli.options import Json, console_for, examples, print_json
from lorakin.cli.recipe_options import recipe_options
from lorakin.cli.verbosity import messages_on
from lorakin.compare.shared_fields import OF_A_RECIPE
from lorakin.training.recipe import DATA_HELP, MODEL_HELP

if TYPE_CHECKING:
    from lorakin.compare.comparison import Comparison

EXAMPLES = examples(
    "lorakin compare --model smollm2 --data rows.jsonl --budget steps=200 --out comparison",
    "lorakin compare --model smollm2 --data rows.jsonl --methods 'dora vera dora,adalora' "
    "--seeds 5 --out comparison",
    "lorakin compare --model minilm --data cola.jsonl --metric matthews --out comparison",
    "lorakin compare --model org/model --data rows.parquet --budget minutes=10,params=2m "
    "--devices cuda:0,cuda:1 --out runs",
)
OUT_HELP = "A directory: a new one, or one where a comparison was interrupted."
METHODS_HELP = "all, or methods with spaces between: 'dora vera dora,lora+'. \\[default: all]"
BUDGET_HELP = (
    "Budget of each trial: steps=… or minutes=…; optionally params=…, the most parameters a "
    "method may train."
)
SWEEP_HELP = (
    "Learning rates to try. auto: half decades from each method's usual rate; or rates, such as "
    "1e-4,3e-4."
)
DEVICES_HELP = (
    "Devices, which run one trial at a time: cuda:0,cuda:1 or cpu,cpu. auto: all GPUs, or the CPU."
)
SET_HELP = "Any other setting, for the methods that have it, such as ratio=8."

METRIC_HELP = (
    "What decides: loss, or a metric of the task, such as matthews. \\[default: accuracy, micro_f1 "
    "or pearson; loss for a language model]"
)

Methods = Annotated[list[str] | None, typer.Option(help=METHODS_HELP)]
EvalData = Annotated[
    str | None, typer.Option(help="Rows to report on. \\[default: split off the data]")
]
Rank = Annotated[
    int | None, typer.Option(help="Rank at which methods are compared. \\[default: 16]")
]
Alpha = Annotated[
    float | None,
    typer.Option(help="The scale is alpha/rank, the same for all. \\[default: 2 × rank]"),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)]


@recipe_options(*OF_A_RECIPE)
def command(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)],
    data: Annotated[str, typer.Option("--data", "-d", help=DATA_HELP)],
    out: Annotated[str, typer.Option("--out", "-o", help=OUT_HELP)],
    methods: Methods = None,
    budget: Annotated[str, typer.Option(help=BUDGET_HELP)] = "steps=200",
    seeds: Annotated[int, typer.Option(help="Runs of each method at its best learning rate.")] = 3,
    lr_sweep: Annotated[str, typer.Option(help=SWEEP_HELP)] = "auto",
    devices: Annotated[str, typer.Option(help=DEVICES_HELP)] = "auto",
    eval_data: EvalData = None,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Annotated[float, typer.Option(help="Dropout, for the methods that support it.")] = 0.0,
    settings: Settings = None,
    metric: Annotated[str | None, typer.Option(help=METRIC_HELP)] = None,
    *,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Compare methods on this model and data.

    Every method gets the same budget and its own tuned learning rate, and runs with several seeds,
    next to plain LoRA and to controls that show what a difference comes from. Every trial is one
    row in results.jsonl; the same command resumes a comparison that was killed. The result is
    report.html, which opens in any browser.
    """
    from lorakin.compare.comparison import Comparison
    from lorakin.family.method_words import methods_of
    from lorakin.training.yaml_values import parse_settings

    comparison = Comparison(
        model=model, data=data, out=out, methods=methods_of(" ".join(methods or ["all"])),
        budget=budget, seeds=seeds, sweep=lr_sweep, eval_data=eval_data, rank=rank, alpha=alpha,
        dropout=dropout, settings=parse_settings(settings or []), metric=metric,
        recipe=flags,
    )  # fmt: skip
    _run(comparison, devices, as_json)


def _run(comparison: Comparison, devices: str, as_json: bool) -> None:
    """Runs the trials and writes the report, also when the trials are interrupted."""
    from lorakin.compare import workers
    from lorakin.compare.directory import REPORT, locked
    from lorakin.compare.preparation import prepare
    from lorakin.compare.prepared_comparison import check_anything_ran
    from lorakin.compare.progress import Board
    from lorakin.report import comparison_page

    console = messages_on(as_json)
    chosen_devices = workers.devices_of(devices)
    with locked(comparison):
        comparison_run = prepare(comparison, console)
        try:
            with Board(console, len(chosen_devices)) as board:
                workers.run(comparison_run, chosen_devices, board)
        finally:
            has_results = bool(comparison_run.results.rows)
            report = comparison_page.write if has_results else comparison_page.findings_of
            findings = report(comparison_run)
    check_anything_ran(comparison_run)
    if as_json:
        print_json(findings.as_dict())
        return
    console = console_for(False)
    for sentence in findings.verdict:
        console.print(sentence.replace("**", ""))
    console.print(f"the report: {comparison_run.out / REPORT}")
