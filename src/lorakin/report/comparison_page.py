"""The report of a comparison: one page with the verdict, a table, and charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lorakin.compare.arms import CONTROL, FULL, MEMBER, PLAIN, REFERENCE
from lorakin.compare.directory import REPORT, TRIALS
from lorakin.compare.learned import nothing_learned
from lorakin.compare.next_trials import sweep_figures
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.report_answers import DRAWS, LOSS, words_of
from lorakin.compare.results import DONE, TIMING, ResultRow
from lorakin.compare.standings import Standing, leaders, standings_of
from lorakin.compare.verdict import verdict
from lorakin.family.method_words import axes_of
from lorakin.report import heatmaps, page
from lorakin.report.charts import loss_curves, rate_curves
from lorakin.report.comparison_table import arms_table, troubles_table
from lorakin.report.cost_chart import Cost, pareto
from lorakin.report.magnitude_direction import Point, magnitude_direction
from lorakin.report.page import Block, Code, Figure, Paragraph, Section
from lorakin.report.rank_history import ranks_over_time
from lorakin.storage.summary import layer_and_name
from lorakin.terminal import command
from lorakin.training.recipe import option_of

TITLE = "Which method, on this model and data?"


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a comparison findings: where its arms stand, and a verdict in words."""

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


def findings_of(comparison_run: PreparedComparison) -> Findings:
    """Returns what the rows so far support."""
    measure = comparison_run.measure
    standings = standings_of(comparison_run.arms, comparison_run.results.rows, measure)
    return Findings(measure, standings, verdict(standings, measure))


def write(comparison_run: PreparedComparison) -> Findings:
    """Writes `report.html` into the comparison's directory and returns what it says.

    Raises:
        OutputError: the file cannot be written.
    """
    findings = findings_of(comparison_run)
    page.write(comparison_run.out / REPORT, html(comparison_run, findings))
    return findings


def html(comparison_run: PreparedComparison, findings: Findings) -> str:
    """Returns the report as HTML."""
    options, left = comparison_run.comparison, comparison_run.expected()
    seeds = "one seed" if options.seeds == 1 else f"{options.seeds} seeds"
    subtitle = (
        f"`{options.model}` on `{options.data}`: {len(comparison_run.arms)} arms, "
        f"{options.parsed_budget} each, {seeds}."
    )
    if left:
        subtitle += f" **Unfinished**: about {left} trials are still to run."
    troubles = troubles_table(findings.standings)
    tables: list[Block] = [arms_table(findings.standings, findings.measure)]
    tables += [troubles] if troubles else []
    sections = [
        Section("Verdict", [Paragraph(*findings.verdict), *_to_use(comparison_run, findings)]),
        Section("All arms", tables),
        Section("Quality against cost", _costs(findings)),
        Section("Learning", list(_curves(comparison_run, findings))),
        Section("Inside the weights", list(_weights(findings))),
        Section("How much each layer changes", _changes(findings), open=False),
        Section("How this was measured", [_method(comparison_run, findings)], open=False),
    ]
    return page.render(TITLE, subtitle, [section for section in sections if section.blocks])


def _to_use(comparison_run: PreparedComparison, findings: Findings) -> Iterator[Block]:
    """Yields the command that trains the method that the verdict points to, if one learned."""
    if nothing_learned(findings.standings):
        return
    best = next(iter(leaders(findings.standings)), findings.standings[0])
    options, steps = comparison_run.comparison, comparison_run.steps(best.arm.name)
    arguments = ["lorakin", "train", "--model", options.model, "--data", options.data]
    arguments += ["--method", best.arm.words]
    for name, value in best.arm.settings(steps).items():
        text = f"{value:g}" if isinstance(value, float) else f"{value}"
        arguments += ["--set", f"{name}={text}"]
    if best.lr is not None:
        arguments += ["--lr", f"{best.lr:g}"]
    arguments += ["--steps", str(steps)]
    for name, value in options.recipe.items():
        arguments += as_options(name, value)
    yield Code(
        f"To train {best.arm.title} like this on all rows. The adapters of the runs above are in "
        f"`{comparison_run.out / TRIALS}`.",
        command(*arguments, "--out", "adapter"),
    )


def as_options(name: str, value: Any) -> list[str]:
    """Returns a field of the recipe as options of `lorakin train`.

    >>> as_options("schedule_args", {"min_lr": 1e-05})
    ['--schedule-arg', 'min_lr=1e-05']
    """
    option = option_of(name)
    flag = next(iter(option.names if option else ()), f"--{name.replace('_', '-')}")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        values = [f"{key}={item}" for key, item in value.items()]
    return [part for one in values for part in (flag, str(one))]


def _costs(findings: Findings) -> list[Block]:
    """Returns charts of quality against cost, for the arms that train, if any learned."""
    if nothing_learned(findings.standings):
        return []
    shown = [s for s in findings.standings if s.done and s.quality and s.lr is not None]
    parameters = {s.arm.name: float(s.trained or 0) for s in shown}
    memory = {s.arm.name: s.memory.median for s in shown if s.memory}
    time = {s.arm.name: s.time.median for s in shown if s.time}
    costs = (
        Cost("trained parameters", "log", parameters),
        Cost(f"memory, × {PLAIN}", "linear", memory),
        Cost(f"time of a step, × {PLAIN}", "linear", time),
    )
    return [
        pareto(shown, cost, findings.measure)
        for cost in costs
        if sum(map(bool, cost.of.values())) > 1
    ]


def _curves(comparison_run: PreparedComparison, findings: Findings) -> Iterator[Block]:
    """Yields charts of losses and sweeps."""
    trained = [s for s in findings.standings if s.lr is not None and s.done and s.done[0].losses]
    groups = {
        "Training loss": [s for s in trained if s.kind in (REFERENCE, MEMBER)],
        "Training loss of controls and limits": [s for s in trained if s.kind != MEMBER],
    }
    for title, group in groups.items():
        if len(group) > 1:
            yield loss_curves(title, group)

    rows, measure = comparison_run.results.rows, comparison_run.measure
    sweeps = {s.arm.title: sweep_figures(s.arm.name, rows, measure) for s in findings.standings}
    sweeps = {title: figures for title, figures in sweeps.items() if len(figures) > 1}
    if sweeps:
        best = {s.arm.title: s.lr for s in findings.standings if s.lr is not None}
        of_sweeps = {title: best[title] for title in sweeps if title in best}
        yield rate_curves(sweeps, of_sweeps, measure)


def _first_runs(findings: Findings) -> list[tuple[Standing, ResultRow]]:
    """Returns each arm that trains with the run of its first seed, for pictures of one run."""
    return [(s, s.done[0]) for s in findings.standings if s.done and s.lr is not None]


def _weights(findings: Findings) -> Iterator[Block]:
    """Yields pictures of magnitudes and directions, ranks and importance."""
    runs = _first_runs(findings)
    if points := _points([(s, row) for s, row in runs if _has_scatter(s)]):
        yield magnitude_direction(points)
    for s, row in runs:
        if row.ranks:
            yield from (_titled(s, figure) for figure in ranks_over_time(row.ranks))
        if row.importance:
            yield _titled(s, heatmaps.importance(row.importance, set(row.own)))


def _has_scatter(s: Standing) -> bool:
    """Returns whether DoRA's picture shows the arm: plain LoRA, full training, and gains."""
    has_gain = s.kind == MEMBER and "gain" in axes_of(s.arm.words)
    return has_gain or s.kind == REFERENCE or s.arm.name == FULL


def _points(runs: Sequence[tuple[Standing, ResultRow]]) -> list[Point]:
    return [
        Point(s.arm.title, *layer_and_name(path), step, magnitude, direction)
        for s, row in runs
        for step, moves in row.moves
        for path, (magnitude, direction) in moves.items()
    ]


def _changes(findings: Findings) -> list[Block]:
    """Returns a picture of each arm's changes by layer."""
    blocks: list[Block] = []
    for s, row in _first_runs(findings):
        if s.kind != CONTROL and row.layers:
            changes = {path: change["relative"] for path, change in row.layers.items()}
            blocks.append(_titled(s, heatmaps.change_by_layer(changes, relative=True)))
    return blocks


def _titled(s: Standing, figure: Figure) -> Figure:
    """Returns the figure with the arm's name before its title."""
    return dataclasses.replace(figure, title=f"{s.arm.title}: {figure.title}")


def _method(comparison_run: PreparedComparison, findings: Findings) -> Paragraph:
    """Says how the comparison was made."""
    options, parts = comparison_run.comparison, comparison_run.parts
    rows, plain = comparison_run.results.rows, findings.standings[0].quality
    counts = {int(row.report["count"]) for row in rows if row.report and "perplexity" in row.report}
    answers = f", which have {max(counts):,} answer tokens" if counts else ""
    left_out = f" Left out: {parts.left_out}." if parts.left_out else ""
    devices = sorted({row.device for row in rows if row.device})
    done = sum(row.status == DONE for row in rows)
    return Paragraph(
        f"**Data**: {parts.train:,} rows to train on, {parts.tune} to choose learning rates by, "
        f"{parts.report} to report on; the same for all arms.{left_out} The table's figures are "
        f"measured on the rows to report on{answers}. What decides is "
        f"{_decides(findings.measure)}.",
        _budget(comparison_run, findings),
        f"**Learning rate**: {_rates(comparison_run)}",
        f"**Size**: rank {options.rank} and alpha {options.alpha:g} for plain {PLAIN}. The other "
        "methods have a comparable rank and scale: a budget of ranks ends at that rank, and a pair "
        "that is drawn at random keeps its usual rank.",
        _intervals(plain.drawn if plain else ""),
        "**Memory** is what training added to its process. For full fine-tuning that includes the "
        "base, which is kept beside the trained copy. **Time** is the median step of a run; on a "
        f"CPU, which trials share, the processor's own time. {done} of {len(rows)} trials ended "
        f"well, on {', '.join(devices)}.",
    )


def _decides(measure: str) -> str:
    return "the loss" if measure == LOSS else f"{words_of(measure)} (--metric chooses another)"


def _intervals(rows: str) -> str:
    """Says what the intervals cover; `rows` says whose draw, or is empty."""
    seeds = "how much a result depends on the random start and the order of the rows"
    covers = (
        f"cover the seeds ({seeds}; Student's t) and the draw of the {rows} to report on "
        f"(drawn again {DRAWS} times, the same for all runs); the two are added in squares"
        if rows
        else f"are Student's t over the seeds: {seeds}, but not on which rows were held out"
    )
    paired = "seed and on the same draws of the rows" if rows else "seed"
    return (
        f"**Intervals** (95 %) {covers}. Differences are taken between runs of the same {paired}, "
        "which makes them narrower. A method is called better only if the test that belongs to "
        "that interval, corrected by Holm for the number of methods, is below 5 %."
    )


def _budget(comparison_run: PreparedComparison, findings: Findings) -> str:
    budget = comparison_run.comparison.parsed_budget
    text = (
        f"**Budget**: {budget} for every trial. All arms see the same rows in the same order with "
        "the same seed."
    )
    if any(row.trial.stage == TIMING for row in comparison_run.results.rows):
        steps = (f"{s.arm.title} {comparison_run.steps(s.arm.name)}" for s in findings.standings)
        text += f" Steps in that time: {', '.join(steps)}."
    if probes := [s.arm.title for s in findings.standings if any(row.importance for row in s.done)]:
        text += f" The probe of {', '.join(probes)} comes on top."
    return text


def _rates(comparison_run: PreparedComparison) -> str:
    options, words = comparison_run.comparison, words_of(comparison_run.measure)
    ties = "" if comparison_run.measure == "loss" else "; of equal ones the one with less loss"
    if options.parsed_sweep.rates is not None:
        return (
            f"the best of {options.sweep}, by the {words} on the tuning rows with the first "
            f"seed{ties}."
        )
    return (
        "runs with the first seed at the method's usual rate and at one and two half decades above "
        "it, continued while the best is at an edge. The other seeds run at the best rate, by the "
        f"{words} on the tuning rows{ties}."
    )
