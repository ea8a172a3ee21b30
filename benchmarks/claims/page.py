"""Makes the page of the claims, its pictures, and the figures that `lorakin compare` starts from."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims import archive, pictures
from benchmarks.claims.analysis import UNKNOWN, Evidence, Judged, judged_together
from benchmarks.claims.arms import METHODS, PILOT
from benchmarks.claims.bleu import WrittenRow, bleu_of, difference
from benchmarks.claims.design import design
from benchmarks.claims.judges import unit_of, written
from benchmarks.claims.statements import STATEMENTS
from benchmarks.claims.study import PILOT_SEEDS, SEEDS
from lorakin.compare.figures import level, with_interval
from lorakin.compare.prior import Prior
from lorakin.compare.report_answers import sign_of
from lorakin.compare.standings import Standing

BEGIN, END = "<!-- made by: python -m benchmarks.claims page -->", "<!-- end -->"
"""What stands between these lines of the page is made again."""
PRIOR = archive.ROOT / "src" / "lorakin" / "compare" / "prior.json"


def write(page: Path, kept: Sequence[tuple[Evidence, dict[str, Any]]]) -> None:
    """Writes the made part of the page, and the pictures beside the rows."""
    evidence, hows = [e for e, _ in kept], [how for _, how in kept]
    content = page.read_text(encoding="utf-8")
    before, rest = content.split(BEGIN)
    _, after = rest.split(END)
    lines = "\n".join(made(evidence, hows))
    page.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}", encoding="utf-8")
    prior = dataclasses.asdict(prior_of(finished(evidence)))
    PRIOR.write_text(json.dumps(prior, indent=1) + "\n", encoding="utf-8")
    for name, picture in pictures_of(evidence).items():
        picture.draw(archive.FOLDER / name)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        says: what it shows.
        draw: draws it into a file.
    """

    says: str
    draw: Callable[[Path], None]


def finished(evidence: Sequence[Evidence]) -> list[Evidence]:
    """Returns the tasks on which every method has run, all if there is none."""
    return [e for e in evidence if all(name in e.standings for name in METHODS)] or [*evidence]


def pictures_of(evidence: Sequence[Evidence]) -> dict[str, Picture]:
    """Returns the page's pictures by their files, of the tasks on which every method has run."""
    evidence = finished(evidence)
    done = [name for name in METHODS if all(name in e.standings for e in evidence)]
    found = {
        "pareto.png": Picture(
            "Quality against trained parameters, memory and time, each as a multiple of LoRA's; "
            "no other method beats those on the line in both",
            lambda path: pictures.pareto(evidence, done, path),
        ),
        "ranks.png": Picture(
            "The methods' mean ranks over the tasks, and how far apart they must lie to differ",
            lambda path: pictures.critical_differences(evidence, done, path),
        ),
        "curves.png": Picture(
            "The loss on the tuning rows while training, the mean over seeds",
            lambda path: pictures.curves(evidence, done, path),
        ),
    }
    if len(evidence) == 1:
        del found["ranks.png"]
    return found


def prior_of(evidence: Sequence[Evidence]) -> Prior:
    """Returns on how many tasks each method was better than tuned LoRA, the same, or worse."""
    found: dict[str, dict[str, int]] = {}
    for e in evidence:
        judged = judged_together(e, METHODS)
        for name in METHODS:
            if name not in judged:
                continue
            one, counts = judged[name], found.setdefault(name, {})
            if one.verdict != UNKNOWN:
                counts[one.verdict] = counts.get(one.verdict, 0) + 1
    return Prior([e.task.title for e in evidence], found)


def made(evidence: Sequence[Evidence], hows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of the made part: the claims, then each task."""
    yield "| | claim | paper | measured here | verdict |"
    yield "|---|---|---|---|---|"
    for one in STATEMENTS:
        shown, verdict = one.measured(evidence)
        yield f"| {one.member} | {one.claim} | {one.paper} | {shown or '–'} | {verdict} |"
    yield ""
    yield from reached_table(evidence)
    for name, picture in pictures_of(evidence).items():
        yield ""
        yield f"![{picture.says}](claims/{name})"
    for e, how in zip(evidence, hows, strict=True):
        yield ""
        yield f"### {e.task.title}"
        yield ""
        yield f"{said_of(how, len(e.standings['lora'].done))} {flattened(e)}"
        yield ""
        yield chosen_rates(e)
        yield ""
        yield from arms_table(e)
        yield ""
        yield from rates_table(e)
        if e.written:
            yield ""
            yield from bleu_table(e)


def reached_table(evidence: Sequence[Evidence]) -> Iterator[str]:
    """Yields how wide the intervals are beside what the pilot let expect."""
    yield "How wide the 95 % intervals of a difference from LoRA are, as ±; the pilot's is for five seeds:"
    yield ""
    yield "| task | aimed at | dora, by the pilot | dora, reached | all methods, reached | seeds |"
    yield "|---|---|---|---|---|---|"
    for e in evidence:
        planned = design(pilot_of(e), SEEDS)
        found = {name: e.difference(name) for name in METHODS if name != "lora"}
        halves = {name: d.half for name, d in found.items() if d is not None}
        cells = [
            f"{e.task.target / e.unit:.2g} {unit_of(e)}",
            f"{planned.half:.2g}" if planned else "–",
            f"{halves['dora']:.2g}" if "dora" in halves else "–",
            f"{min(halves.values()):.2g} to {max(halves.values()):.2g}" if halves else "–",
            seeds_of(e),
        ]
        yield f"| {e.task.title} | {' | '.join(cells)} |"


def seeds_of(e: Evidence) -> str:
    """Returns how many seeds the methods of a task had, such as "3 to 5"."""
    counts = {len(e.standings[name].done) for name in METHODS if name in e.standings}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)}))


def pilot_of(e: Evidence) -> Evidence:
    """Returns the task with the pilot's runs alone: those of the first three seeds."""
    first = {
        name: dataclasses.replace(s, rows=[row for row in s.rows if row.trial.seed < PILOT_SEEDS])
        for name, s in e.standings.items()
        if name in PILOT
    }
    return dataclasses.replace(e, standings=first)


def said_of(how: dict[str, Any], seeds: int) -> str:
    """Says how a task was run."""
    days = sorted(day for place in how["places"] for day in place["days"])
    machines = f", {count} machines" if (count := len(how["places"])) > 1 else ""
    return (
        f"{how['model']}, {how['steps']} steps of {how['batch']} rows, up to {seeds} seeds; "
        f"{how['train']:,} rows to train on, {how['tune']:,} to choose rates by, {how['report']:,} "
        f"to report on. {how['machine']}{machines}; {' to '.join(sorted({days[0], days[-1]}))}."
    )


def flattened(e: Evidence) -> str:
    """Says how flat plain LoRA's curve was at the end: its loss on the tuning rows, over seeds."""
    curves = [dict(row.curve) for row in e.standings["lora"].done if row.curve]
    if not curves:
        return ""
    last = max(curves[0])
    steps = [min(curves[0], key=lambda step: abs(step - last * part)) for part in (0.5, 0.75, 1)]
    losses = [statistics.fmean(curve[step] for curve in curves) for step in steps]
    said = ", ".join(f"{loss:.3f}" for loss in losses)
    return (
        f"LoRA's loss on the tuning rows after half, three quarters and all of the steps: {said}."
    )


def chosen_rates(e: Evidence) -> str:
    """Says what the choice of rates, by one seed and the tuning rows, may have cost."""
    sign = sign_of(e.task.measure)
    lost = []
    for name, figures in e.reported.items():
        chosen = e.standings[name].lr
        if chosen in figures:
            known = [sign * figure for figure in figures.values()]
            lost.append((max(known) - sign * figures[chosen]) / e.unit)
    best = sum(not gap for gap in lost)
    worst = f"{max(lost, default=0.0):.{1 if unit_of(e) == 'points' else 3}f}"
    return (
        f"Of {len(lost)} arms with rates, {best} were the best on the reported rows, too, at the "
        f"chosen rate (first seed); the others missed at most {worst} {unit_of(e)}. That chance is "
        "in no interval: they are of runs at the chosen rates, on these training rows."
    )


def arms_table(e: Evidence) -> Iterator[str]:
    """Yields a task's table of arms."""
    together = judged_together(e, METHODS)
    own = "| on GLUE's held-out rows alone " if e.task.added else ""
    titles = (
        f"| arm | seeds | {e.task.measure} | ahead of lora, {unit_of(e)} {own}| p (Holm) | verdict "
        "| rate | trained | time | memory |"
    )
    yield titles
    yield "|---" * (titles.count("|") - 1) + "|"
    for name, s in e.standings.items():
        yield f"| {' | '.join(_cells(e, name, s, together.get(name)))} |"


def rates_table(e: Evidence) -> Iterator[str]:
    """Yields what each arm's learning rates gave on the tuning rows."""
    measure = e.task.chosen_by
    yield f"The {measure} on the tuning rows by learning rate, first seed; the best is chosen:"
    yield ""
    yield "| arm | rates |"
    yield "|---|---|"
    for name, figures in e.sweeps.items():
        s = e.standings[name]
        bold = {s.lr: "**"}
        said = [
            f"{bold.get(lr, '')}{lr:g}: {level(figure, measure)}{bold.get(lr, '')}"
            for lr, figure in sorted(figures.items())
        ]
        yield f"| {s.arm.title} | {', '.join(said)} |"


def bleu_table(e: Evidence) -> Iterator[str]:
    """Yields a table of the BLEU of what adapters wrote."""
    by_arm: dict[str, list[WrittenRow]] = {}
    for row in e.written:
        by_arm.setdefault(row.arm, []).append(row)
    prompts = range(len(e.written[0].given))
    yield f"Greedy answers to {len(prompts)} meanings, all references of each:"
    yield ""
    yield "| arm | BLEU | ahead of lora | seeds |"
    yield "|---|---|---|---|"
    for name, rows in by_arm.items():
        values = [bleu_of(row, prompts) for row in rows]
        found = difference(rows, by_arm["lora"]) if name != "lora" and "lora" in by_arm else None
        gap = "–"
        if found is not None and math.isfinite(found.half_width):
            low, high = found.mean - found.half_width, found.mean + found.half_width
            gap = f"{found.mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
        yield f"| {name} | {sum(values) / len(values):.1f} | {gap} | {len(values)} |"


def _cells(e: Evidence, name: str, s: Standing, one: Judged | None) -> Iterator[str]:
    yield s.arm.title
    yield str(len(s.done)) if s.lr else "–"
    yield "–" if s.quality is None else with_interval(s.quality, e.task.measure)
    yield written(one.difference, unit_of(e)) if one else "–"
    if e.task.added:
        own = e.on_own_rows(name) if one else None
        yield written(own, unit_of(e)) if own else "–"
    yield f"{one.p:.2g}" if one and one.p is not None else "–"
    yield one.verdict if one else "–"
    yield f"{s.lr:g}{' (edge)' if s.at_edge else ''}" if s.lr else "–"
    yield f"{s.trained:,}" if s.lr and s.trained else "–"
    for ratio in (s.time, s.memory):
        yield f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "–"
