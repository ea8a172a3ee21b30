"""`lorakin combine`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import Json, MaxKL, Model, NoVerify, OtherBase, console_for, examples, print_json

EXAMPLES = examples(
    "lorakin combine french=0.7 legal=0.5 --model smollm2 --out both",
    "lorakin combine french=0.7 legal=0.5 --rank 16 --model smollm2 --out both",
)


def command(
    parts: Annotated[list[str], typer.Argument(help="DIRECTORY=WEIGHT, or DIRECTORY for weight 1.")],
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory for the sum.")],
    rank: Annotated[int | None, typer.Option(help="The nearest sum of that rank; without it, exact, and ranks add up.")] = None,
    error: Annotated[float | None, typer.Option(help="The smallest ranks whose relative error is at most this.")] = None,
    verify: NoVerify = True,
    max_kl: MaxKL = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Make one adapter whose change is the weighted sum of several adapters' changes."""
    from lorakin.serving.combination import combine_directories

    weights: dict[str, float] = {}
    for directory, weight in map(_weight, parts):
        weights[directory] = weights.get(directory, 0.0) + weight
    report = combine_directories(
        weights, model, out, rank=rank, error=error, max_kl=max_kl, verify=verify, other_base=other_base
    )
    if as_json:
        print_json(report)
        return
    ranks, worst = report["ranks"], report["largest_relative_error"]
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    near = f"largest relative error {worst:.3g}" if worst else "exact"
    console = console_for(False)
    console.print(f"sum of {len(parts)} adapters in {out}: {span}, {near}", highlight=False, markup=False)
    if report["verified"]:
        console.print(f"compared with the exact sum: {report['agreement']}", highlight=False, markup=False)


def _weight(part: str) -> tuple[str, float]:
    from lorakin.errors import SettingError

    directory, equals, weight = part.rpartition("=")
    if not equals:
        return part, 1.0
    try:
        return directory, float(weight)
    except ValueError:
        raise SettingError(f"{part!r} is no DIRECTORY=WEIGHT: {weight!r} is no number") from None
