"""The report of a comparison: one page with the verdict, a table, and charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lorakin.compare.arms import CONTROL, FULL, MEMBER, PLAIN, REFERENCE
from lorakin.compare.directory import REPORT, TRIALS
from lorakin.compare.results import DONE, TIMING, ResultRow
from lorakin.compare.schedule import swept
from lorakin.compare.standings import Standing, leaders, measure_of, standings
from lorakin.compare.study import Study
from lorakin.compare.verdict import verdict
from lorakin.family.method_words import axes_of
from lorakin.report import heatmaps, page
from lorakin.report.charts import loss_curves, rate_curves
from lorakin.report.comparison_table import arms_table, troubles_table
from lorakin.report.cost_chart import Cost, pareto
from lorakin.report.magnitude_direction import Point, magnitude_direction
from lorakin.report.page import Block, Code, Figure, Paragraph, Section
from lorakin.report.rank_history import ranks_over_time
from lorakin.storage.summary import place_of
from lorakin.terminal import command

TITLE = "Which method, on this model and data?"


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a comparison found: where its arms stand, and a verdict in words."""

    measure: str
    standings: list[Standing]
    verdict: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns the findings for `--json`."""
        return {
            "measure": self.measure,
            "verdict": [sentence.replace("**", "") for sentence in self.verdict],
            "arms": [s.as_dict() for s in self.standings],
        }


def findings(study: Study) -> Findings:
    """Returns what the rows so far support."""
    measure = measure_of(study.results.rows)
    found = standings(study.arms, study.results.rows, measure)
    return Findings(measure, found, verdict(found, measure))


def write(study: Study) -> Findings:
    """Writes `report.html` into the comparison's directory and returns what it says.

    Raises:
        OutputError: the file cannot be written.
    """
    found = findings(study)
    page.write(study.out / REPORT, html(study, found))
    return found


def html(study: Study, found: Findings) -> str:
    """Returns the report as HTML."""
    asked, left = study.comparison, study.expected()
    seeds = "one seed" if asked.seeds == 1 else f"{asked.seeds} seeds"
    subtitle = (
        f"`{asked.model}` on `{asked.data}`: {len(study.arms)} arms, {asked.spent} each, {seeds}."
    )
    if left:
        subtitle += f" **Unfinished**: about {left} trials are still to run."
    troubles = troubles_table(found.standings)
    tables: list[Block] = [arms_table(found.standings, found.measure)]
    tables += [troubles] if troubles else []
    sections = [
        Section("Verdict", [Paragraph(*found.verdict), _to_use(study, found)]),
        Section("All arms", tables),
        Section("Quality against cost", _costs(found)),
        Section("Learning", list(_curves(study, found))),
        Section("Inside the weights", list(_weights(found))),
        Section("How much each layer changes", _changes(found), open=False),
        Section("How this was measured", [_method(study, found)], open=False),
    ]
    return page.render(TITLE, subtitle, [section for section in sections if section.blocks])


def _to_use(study: Study, found: Findings) -> Code:
    """Returns the command that trains the method that the verdict points to."""
    best = next(iter(leaders(found.standings)), found.standings[0])
    asked, steps = study.comparison, study.steps(best.arm.name)
    words = ["lorakin", "train", "--model", asked.model, "--data", asked.data]
    words += ["--method", best.arm.words]
    for name, value in best.arm.settings(steps).items():
        words += ["--set", f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"]
    if best.lr is not None:
        words += ["--lr", f"{best.lr:g}"]
    words += ["--steps", str(steps)]
    for name, value in asked.recipe.items():
        words += _flag(name, value)
    return Code(
        f"To train {best.arm.title} like this on all rows. The adapters of the runs above are in "
        f"`{study.out / TRIALS}`.",
        command(*words, "--out", "adapter"),
    )


def _flag(name: str, value: Any) -> list[str]:
    """Returns a field of the recipe as an option of `lorakin train`."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{option}"]
    return [f"--{option}", ",".join(value) if isinstance(value, list) else str(value)]


def _costs(found: Findings) -> list[Block]:
    """Returns charts of quality against cost, for the arms that train."""
    shown = [s for s in found.standings if s.done and s.quality and s.lr is not None]
    parameters = {s.arm.name: float(s.trained or 0) for s in shown}
    memory = {s.arm.name: s.memory.median for s in shown if s.memory}
    time = {s.arm.name: s.time.median for s in shown if s.time}
    costs = (
        Cost("trained parameters", "log", parameters),
        Cost(f"memory, × {PLAIN}", "linear", memory),
        Cost(f"time of a step, × {PLAIN}", "linear", time),
    )
    return [
        pareto(shown, cost, found.measure) for cost in costs if sum(map(bool, cost.of.values())) > 1
    ]


def _curves(study: Study, found: Findings) -> Iterator[Block]:
    """Yields charts of losses and sweeps."""
    trained = [s for s in found.standings if s.lr is not None and s.done and s.done[0].losses]
    groups = {
        "Training loss": [s for s in trained if s.kind in (REFERENCE, MEMBER)],
        "Training loss of controls and limits": [s for s in trained if s.kind != MEMBER],
    }
    for title, group in groups.items():
        if len(group) > 1:
            yield loss_curves(title, group)

    sweeps = {s.arm.title: swept(s.arm.name, study.results.rows) for s in found.standings}
    sweeps = {title: losses for title, losses in sweeps.items() if len(losses) > 1}
    if sweeps:
        best = {s.arm.title: s.lr for s in found.standings if s.lr is not None}
        yield rate_curves(sweeps, {title: best[title] for title in sweeps if title in best})


def _first_runs(found: Findings) -> list[tuple[Standing, ResultRow]]:
    """Returns each arm that trains with the run of its first seed, for pictures of one run."""
    return [(s, s.done[0]) for s in found.standings if s.done and s.lr is not None]


def _weights(found: Findings) -> Iterator[Block]:
    """Yields pictures of magnitudes and directions, ranks and importance."""
    runs = _first_runs(found)
    if points := _points([(s, row) for s, row in runs if _has_scatter(s)]):
        yield magnitude_direction(points)
    for s, row in runs:
        if row.ranks:
            yield from (_of(s, figure) for figure in ranks_over_time(row.ranks))
        if row.importance:
            yield _of(s, heatmaps.importance(row.importance, set(row.own)))


def _has_scatter(s: Standing) -> bool:
    """Whether DoRA's picture is about the arm: plain LoRA, full training, methods with a gain."""
    has_gain = s.kind == MEMBER and "gain" in axes_of(s.arm.words)
    return has_gain or s.kind == REFERENCE or s.arm.name == FULL


def _points(runs: Sequence[tuple[Standing, ResultRow]]) -> list[Point]:
    return [
        Point(s.arm.title, *place_of(path), step, magnitude, direction)
        for s, row in runs
        for step, moves in row.moves
        for path, (magnitude, direction) in moves.items()
    ]


def _changes(found: Findings) -> list[Block]:
    """Returns a picture of each arm's changes by layer."""
    blocks: list[Block] = []
    for s, row in _first_runs(found):
        if s.kind != CONTROL and row.layers:
            changes = {path: change["relative"] for path, change in row.layers.items()}
            blocks.append(_of(s, heatmaps.change_by_layer(changes, relative=True)))
    return blocks


def _of(s: Standing, figure: Figure) -> Figure:
    """Puts the arm's name before the figure's title."""
    return dataclasses.replace(figure, title=f"{s.arm.title}: {figure.title}")


def _method(study: Study, found: Findings) -> Paragraph:
    """Says how the comparison was made."""
    asked, parts, rows = study.comparison, study.parts, study.results.rows
    counts = {int(row.report["count"]) for row in rows if row.report and found.measure == "loss"}
    answers = f", which have {max(counts):,} answer tokens" if counts else ""
    left = f" Left out: {parts.left_out}." if parts.left_out else ""
    devices = sorted({row.device for row in rows if row.device})
    done = sum(row.status == DONE for row in rows)
    return Paragraph(
        f"**Data**: {parts.train:,} rows to train on, {parts.tune} to choose learning rates by, "
        f"{parts.report} to report on; the same for all arms.{left} The table's figures are "
        f"measured on the rows to report on{answers}.",
        _budget(study, found),
        f"**Learning rate**: {_rates(study)}",
        f"**Size**: rank {asked.rank} and alpha {asked.alpha:g} for plain {PLAIN}. The other "
        "methods have that rank and scale in their own terms: a budget of ranks ends at that rank, "
        "and a pair that is drawn at random keeps a rank of its own.",
        "**Intervals** are Student's t over the seeds. They show how much a result depends on the "
        "random start and the order of the rows, but not how much it depends on which rows were "
        "held out. Differences are taken between runs of the same seed, which makes them narrower. "
        "A method is called better only if its paired t-test, corrected by Holm for the number of "
        "methods, is below 5 %.",
        "**Memory** is what training added to its process. For full fine-tuning that includes the "
        "base, which is kept beside the trained copy. **Time** is the median step of a run; on a "
        f"CPU, which trials share, the processor's own time. {done} of {len(rows)} trials ended "
        f"well, on {', '.join(devices)}.",
    )


def _budget(study: Study, found: Findings) -> str:
    said = (
        f"**Budget**: {study.comparison.spent} for every trial. All arms see the same rows in the "
        "same order with the same seed."
    )
    if any(row.trial.stage == TIMING for row in study.results.rows):
        steps = (f"{s.arm.title} {study.steps(s.arm.name)}" for s in found.standings)
        said += f" Steps in that time: {', '.join(steps)}."
    if probes := [s.arm.title for s in found.standings if any(row.importance for row in s.done)]:
        said += f" The probe of {', '.join(probes)} comes on top."
    return said


def _rates(study: Study) -> str:
    asked = study.comparison
    if asked.sweeps.rates is not None:
        return f"the best of {asked.sweep}, by the loss on the tuning rows with the first seed."
    return (
        "runs with the first seed at the method's usual rate and at one and two half decades above "
        "it, continued while the best is at an edge. The other seeds run at the rate with the "
        "lowest loss on the tuning rows."
    )
