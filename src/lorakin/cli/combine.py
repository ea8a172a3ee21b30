"""The command `lorakin combine`: combines adapters of one base, and saves the result."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import (
    Json,
    MaxKL,
    Model,
    OtherBase,
    Verify,
    console_for,
    examples,
    print_json,
)
from lorakin.waiting import waiting

EXAMPLES = examples(
    "lorakin combine french=0.7 legal=0.5 --model smollm2 --out both",
    "lorakin combine french=0.7 legal=0.5 --rank 16 --model smollm2 --out both",
    "lorakin combine french legal --how ties --density 0.2 --rank 32 --model smollm2 --out both",
)


HOW_HELP = (
    "How to combine: sum, ties, magnitude_prune, dare_linear or dare_ties. All but sum need "
    "--density, and --rank or --error."
)
ON_HELP = (
    "What to combine. change: the products B·A, of any ranks. factors: A and B separately, as "
    "PEFT's linear and ties do."
)
DENSITY_HELP = "Share of each change's entries to keep, in (0, 1]."
RANK_HELP = (
    "Rank of the result, the nearest of that rank; without it a sum is exact and ranks add up."
)
ERROR_HELP = "Choose in each module the smallest rank whose relative error is at most this."
ELECT_HELP = "How TIES elects a sign: total or frequency. \\[default: total]"
SEED_HELP = "Seed of the entries that DARE keeps. \\[default: 0]"
PARTS_HELP = "DIRECTORY=WEIGHT, or DIRECTORY for weight 1."


def command(
    parts: Annotated[list[str], typer.Argument(help=PARTS_HELP)],
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory for the result.")],
    how: Annotated[str, typer.Option(help=HOW_HELP)] = "sum",
    on: Annotated[str, typer.Option(help=ON_HELP)] = "change",
    density: Annotated[float | None, typer.Option(help=DENSITY_HELP)] = None,
    elect: Annotated[str | None, typer.Option(help=ELECT_HELP)] = None,
    seed: Annotated[int | None, typer.Option(help=SEED_HELP)] = None,
    rank: Annotated[int | None, typer.Option(help=RANK_HELP)] = None,
    error: Annotated[float | None, typer.Option(help=ERROR_HELP)] = None,
    verify: Verify = True,
    max_kl: MaxKL = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Combine several adapters into one.

    The result is the weighted sum of their changes, or a combination by TIES, DARE or pruning.
    """
    from lorakin.serving.combination import combine_directories

    weights: dict[str, float] = {}
    for directory, weight in map(_weight, parts):
        weights[directory] = weights.get(directory, 0.0) + weight
    with waiting("combining"):
        report = combine_directories(
            weights, model, out, how=how, on=on, density=density, elect=elect, seed=seed, rank=rank,
            error=error, max_kl=max_kl, verify=verify, other_base=other_base,
        )  # fmt: skip
    if as_json:
        print_json(report)
        return
    ranks, worst = report["ranks"], report["largest_relative_error"]
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    near = f"largest relative error {worst:.3g}" if worst else "exact"
    console = console_for(False)
    console.print(f"{how} of {len(parts)} adapters in {out}: {span}, {near}")
    if report["verified"]:
        console.print(f"compared with {report['compared_with']}: {report['agreement']}")


def _weight(part: str) -> tuple[str, float]:
    from lorakin.errors import SettingError

    directory, equals, weight = part.rpartition("=")
    if not equals:
        return part, 1.0
    try:
        return directory, float(weight)
    except ValueError:
        raise SettingError(
            f"{part!r} is not DIRECTORY=WEIGHT: {weight!r} is not a number"
        ) from None
