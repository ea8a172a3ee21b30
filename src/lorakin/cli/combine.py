"""`lorakin combine`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakin.cli.options import Json, Model, OtherBase, console_for, examples, print_json

EXAMPLES = examples(
    "lorakin combine french=0.7 legal=0.5 --model smollm2 --out both",
    "lorakin combine french=0.7 legal=0.5 --rank 16 --model smollm2 --out both",
)


def command(
    parts: Annotated[list[str], typer.Argument(help="DIRECTORY=WEIGHT, or DIRECTORY for weight 1.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A directory for the sum.")],
    rank: Annotated[int | None, typer.Option(help="The nearest sum of that rank; without it, exact, and ranks add up.")] = None,
    error: Annotated[float | None, typer.Option(help="The smallest ranks whose relative error is at most this.")] = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Make one adapter whose change is the weighted sum of several adapters' changes."""
    import lorakin as lk
    from lorakin.training.models import load_model

    weights = {f"part{number}": _weight(part) for number, part in enumerate(parts)}
    base = load_model(model, "base").model
    for name, (directory, _) in weights.items():
        lk.load(base, directory, name=name, other_base=other_base)
    summed = lk.combine(base, {name: weight for name, (_, weight) in weights.items()}, rank=rank, error=error)
    summed.adapter.save(out)
    worst = max((fit.error for fit in summed.fits.values()), default=0.0)
    ranks = [fit.rank for fit in summed.fits.values()]
    if as_json:
        print_json({"out": str(out), "largest_relative_error": worst, "ranks": sorted(set(ranks))})
    else:
        console = console_for(False)
        span = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        near = f"largest relative error {worst:.3g}" if worst else "exact"
        console.print(f"sum of {len(parts)} adapters in {out}: {span}, {near}", highlight=False, markup=False)


def _weight(part: str) -> tuple[str, float]:
    from lorakin.errors import SettingError

    directory, equals, weight = part.rpartition("=")
    if not equals:
        return part, 1.0
    try:
        return directory, float(weight)
    except ValueError:
        raise SettingError(f"{part!r} is no DIRECTORY=WEIGHT: {weight!r} is no number") from None
