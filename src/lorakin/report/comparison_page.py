"""The report of a comparison: one page with the verdict, the table, and the pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lorakin.compare import arms as arms_
from lorakin.compare import schedule
from lorakin.compare.comparison import REPORT, TRIALS, Study
from lorakin.compare.results import DONE, TIMING, ResultRow
from lorakin.compare.standings import Ratio, Standing, leaders, measure_of, standings
from lorakin.compare.verdict import percent, verdict, with_interval
from lorakin.family.words import decided
from lorakin.report import charts, page, pictures
from lorakin.report.page import Cell, Code, Column, Figure, Paragraph, Section, Table
from lorakin.storage.summary import place_of
from lorakin.terminal import command

NAME = "Which method, on this model and data?"


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a comparison came to: where its arms stand, and that in words."""

    measure: str
    standings: list[Standing]
    verdict: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        plain = [sentence.replace("**", "") for sentence in self.verdict]
        return {
            "measure": self.measure,
            "verdict": plain,
            "arms": [s.as_dict() for s in self.standings],
        }


def findings(study: Study) -> Findings:
    """What is known from the rows so far."""
    measure = measure_of(study.results.rows)
    found = standings(study.arms, study.results.rows, measure)
    return Findings(measure, found, verdict(found, measure))


def write(study: Study) -> Findings:
    """Write `report.html` into the comparison's directory; returns what it says.

    Raises:
        OutputError: it cannot be written.
    """
    found = findings(study)
    page.write(study.out / REPORT, html(study, found))
    return found


def html(study: Study, found: Findings) -> str:
    """The page."""
    asked, left = study.comparison, study.expected()
    seeds = "one seed" if asked.seeds == 1 else f"{asked.seeds} seeds"
    subtitle = (
        f"`{asked.model}` on `{asked.data}`: {len(study.arms)} arms, {asked.spent} each, {seeds}."
    )
    if left:
        subtitle += f" **Unfinished**: about {left} trials are still to run."
    troubles = [_troubles(found)] if any(s.ended or s.refused for s in found.standings) else []
    sections = [
        Section("Verdict", [Paragraph(*found.verdict), _to_use(study, found)]),
        Section("All arms", [_table(found), *troubles]),
        Section("Quality against cost", _costs(found)),
        Section("Learning", _curves(study, found)),
        Section("Inside the weights", _weights(found)),
        Section("How much each layer changes", _changes(found), open=False),
        Section("How this was measured", [_method(study, found)], open=False),
    ]
    return page.render(NAME, subtitle, [section for section in sections if section.blocks])


def _to_use(study: Study, found: Findings) -> Code:
    """The command that trains what the verdict points at."""
    best = next(iter(leaders(found.standings)), found.standings[0])
    asked, steps = study.comparison, study.steps(best.arm.name)
    words = [
        "lorakin",
        "train",
        "--model",
        asked.model,
        "--data",
        asked.data,
        "--method",
        best.arm.words,
    ]
    for name, value in best.arm.settings(steps).items():
        words += ["--set", f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"]
    words += [] if best.lr is None else ["--lr", f"{best.lr:g}"]
    words += [
        "--steps",
        str(steps),
        *(word for name, value in asked.recipe.items() for word in _flag(name, value)),
    ]
    kept = f"The adapters of the runs above are in `{study.out / TRIALS}`."
    return Code(
        f"To train {best.arm.title} with what was found here, on all rows. {kept}",
        command(*words, "--out", "adapter"),
    )


def _flag(name: str, value: Any) -> list[str]:
    """A setting of the recipe as it is given to `lorakin train`."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{option}"]
    return [f"--{option}", ",".join(value) if isinstance(value, list) else str(value)]


def _table(found: Findings) -> Table:
    measure, plain = found.measure, arms_.PLAIN
    better = "more" if measure == "accuracy" else "less"
    columns = [
        Column(
            "arm",
            "A **control** tells where a difference comes from; a **limit**, what there is to gain.",
            False,
        ),
        Column(
            measure,
            f"Held out: mean and 95 % interval over the seeds, on the rows to report on; {better} is better.",
        ),
        Column(
            "ahead", f"How much better than tuned {plain}, seed by seed, with its 95 % interval."
        ),
        Column("share", f"The part of {plain}'s improvement over the base that it reaches."),
        Column("best lr", "The learning rate with the lowest loss on the tuning rows."),
        Column("trained", "Numbers that are trained."),
        Column("frozen", "Numbers that the adapter keeps and never trains, such as a drawn pair."),
        Column("MiB", "The adapter's files."),
        Column("time", f"Of a training step, × {plain}'s: median over the seeds (lowest–highest)."),
        Column("memory", f"What training added to the process at its peak, × {plain}'s, likewise."),
    ]
    order = sorted(found.standings, key=lambda s: _place(s, measure))
    best = next(
        (s for s in order if s.kind in (arms_.REFERENCE, arms_.MEMBER) and s.quality is not None),
        None,
    )
    rows = [page.TableRow(_cells(s, measure), _mark(s, best)) for s in order]
    note = "**best** is the best mean, which need not be better than the next by more than the noise: the verdict tells."
    return Table("Every arm at its own best learning rate", columns, rows, note)


def _place(s: Standing, measure: str) -> float:
    if s.quality is None:
        return math.inf
    return -s.quality.mean if measure == "accuracy" else s.quality.mean


def _mark(s: Standing, best: Standing | None) -> str:
    if s.refused:
        return "left out"
    if not s.done:
        return "failed" if s.ended else "not yet run"
    fewer = f"{len(s.done)} of {len(s.rows)} seeds" if len(s.done) < len(s.rows) else ""
    return fewer or (
        "best" if s is best else s.kind if s.kind in (arms_.CONTROL, arms_.LIMIT) else ""
    )


def _cells(s: Standing, measure: str) -> list[page.Value]:
    row = s.done[0] if s.done and s.lr is not None else None
    return [
        s.arm.title,
        None if s.quality is None else Cell(with_interval(s.quality, measure), s.quality.mean),
        None
        if s.ahead is None
        else Cell(with_interval(s.ahead, measure, signed=True), s.ahead.mean),
        None if s.share is None else Cell(percent(s.share), s.share),
        None if s.lr is None else Cell(f"{s.lr:g}{' (edge)' if s.at_edge else ''}", s.lr),
        None if row is None else row.trained,
        row.frozen if row and row.frozen else None,
        None if row is None else Cell(f"{row.adapter_bytes / 2**20:.2f}", row.adapter_bytes),
        _ratio(s.time),
        _ratio(s.memory),
    ]


def _ratio(ratio: Ratio | None) -> page.Value:
    return (
        None
        if ratio is None
        else Cell(f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})", ratio.median)
    )


def _troubles(found: Findings) -> Table:
    """What was left out, and the trials that did not end well: none is dropped silently."""
    rows: list[list[page.Value]] = [
        [s.arm.title, None, None, "left out", s.refused] for s in found.standings if s.refused
    ]
    for s in found.standings:
        rows += [
            [s.arm.title, row.trial.lr, row.trial.seed, row.status, row.reason] for row in s.ended
        ]
    columns = [
        Column("arm", numeric=False),
        Column("learning rate"),
        Column("seed"),
        Column("how it ended", numeric=False),
    ]
    return Table("Left out, diverged or failed", [*columns, Column("why", numeric=False)], rows)


def _costs(found: Findings) -> list[page.Block]:
    """Quality against what it takes, of arms that train."""
    shown = [s for s in found.standings if s.done and s.quality and s.lr is not None]
    costs = [
        charts.Cost(
            "trained parameters", "log", {s.arm.name: float(s.trained or 0) for s in shown}
        ),
        charts.Cost(
            f"memory, × {arms_.PLAIN}",
            "linear",
            {s.arm.name: s.memory.median for s in shown if s.memory},
        ),
        charts.Cost(
            f"time of a step, × {arms_.PLAIN}",
            "linear",
            {s.arm.name: s.time.median for s in shown if s.time},
        ),
    ]
    return [
        charts.pareto(shown, cost, found.measure)
        for cost in costs
        if sum(map(bool, cost.of.values())) > 1
    ]


def _curves(study: Study, found: Findings) -> list[page.Block]:
    trained = [s for s in found.standings if s.lr is not None and s.done and s.done[0].losses]
    groups = {
        "Training loss": [s for s in trained if s.kind in (arms_.REFERENCE, arms_.MEMBER)],
        "Training loss of controls and limits": [s for s in trained if s.kind != arms_.MEMBER],
    }
    blocks: list[page.Block] = [
        charts.loss_curves(title, group) for title, group in groups.items() if len(group) > 1
    ]
    swept = {s.arm.title: schedule.swept(s.arm.name, study.results.rows) for s in found.standings}
    if swept := {title: losses for title, losses in swept.items() if len(losses) > 1}:
        best = {
            s.arm.title: s.lr for s in found.standings if s.arm.title in swept and s.lr is not None
        }
        blocks.append(charts.rate_curves(swept, best))
    return blocks


def _first(found: Findings) -> list[tuple[Standing, ResultRow]]:
    """Each arm that trains, with the first seed's run at its best rate, for pictures of one run."""
    return [(s, s.done[0]) for s in found.standings if s.done and s.lr is not None]


def _weights(found: Findings) -> list[page.Block]:
    points = _points([(s, row) for s, row in _first(found) if _has_a_scatter(s)])
    blocks: list[page.Block] = [pictures.magnitude_direction(points)] if points else []
    for s, row in _first(found):
        blocks += (
            [_named(s, figure) for figure in pictures.ranks_over_time(row.ranks)]
            if row.ranks
            else []
        )
        blocks += (
            [_named(s, pictures.importance(row.importance, set(row.own)))] if row.importance else []
        )
    return blocks


def _has_a_scatter(s: Standing) -> bool:
    """Plain LoRA, whole training, and methods that train lengths apart from directions: what the picture is about."""
    gains = s.kind == arms_.MEMBER and "gain" in decided(s.arm.words)
    return gains or s.kind == arms_.REFERENCE or s.arm.name == arms_.FULL


def _points(shown: Sequence[tuple[Standing, ResultRow]]) -> list[pictures.Point]:
    return [
        pictures.Point(s.arm.title, *place_of(path), step, magnitude, direction)
        for s, row in shown
        for step, there in row.moves
        for path, (magnitude, direction) in there.items()
    ]


def _changes(found: Findings) -> list[page.Block]:
    return [
        _named(
            s,
            pictures.change_by_layer(
                {path: there["relative"] for path, there in row.layers.items()}, relative=True
            ),
        )
        for s, row in _first(found)
        if s.kind != arms_.CONTROL and row.layers
    ]


def _named(s: Standing, figure: Figure) -> Figure:
    return dataclasses.replace(figure, title=f"{s.arm.title}: {figure.title}")


def _method(study: Study, found: Findings) -> Paragraph:
    asked, parts, rows = study.comparison, study.parts, study.results.rows
    timed = [
        f"{s.arm.title} {study.steps(s.arm.name)}"
        for s in found.standings
        if any(r.trial.stage == TIMING for r in rows)
    ]
    probes = [s.arm.title for s in found.standings if any(row.importance for row in s.done)]
    counts = {int(row.report["count"]) for row in rows if row.report and found.measure == "loss"}
    counted = f", which have {max(counts):,} answer tokens" if counts else ""
    left = f"; left out were {parts.left_out}" if parts.left_out else ""
    devices = sorted({row.device for row in rows if row.device})
    swept = (
        "one run with the first seed at the method's usual rate and at half decades above it, further while the best is at an "
        "edge; the other seeds follow at the rate with the lowest loss on the tuning rows."
        if asked.sweeps.rates is None
        else f"the best of {asked.sweep}, by the loss on the tuning rows with the first seed."
    )
    return Paragraph(
        f"**Data**: {parts.train:,} rows to train on, {parts.tune} to choose learning rates by, {parts.report} to report on, "
        f"the same for all{left}. The table's figures are of the rows to report on{counted}.",
        f"**Budget**: {asked.spent} for every trial; the same rows in the same order for all arms of one seed."
        + (f" Steps that made: {', '.join(timed)}." if timed else "")
        + (f" The probe of {', '.join(probes)} comes on top." if probes else ""),
        f"**Learning rate**: {swept}",
        f"**Size**: rank {asked.rank} and alpha {asked.alpha:g} for plain {arms_.PLAIN}; the others at that rank and scale in "
        "their own terms: a pruned budget ends at that rank, a drawn pair keeps a rank of its own.",
        "**Intervals** are Student's t over the seeds: they tell how much a result hangs on the start and on the order of the "
        "rows, and not how much on which rows were held out. A difference is taken on the same rows and seed, which lessens "
        "that. A method is called better only if its paired t-test, corrected by Holm for the number of methods, is below 5 %.",
        "**Memory** is what training added to its process; of full fine-tuning that includes the base, kept beside what is "
        "trained. **Time** is that of the median step of a run; on a CPU, which trials share, the processor's own time. "
        f"Of {len(rows)} trials {sum(row.status == DONE for row in rows)} ended well, on {', '.join(devices)}.",
    )
