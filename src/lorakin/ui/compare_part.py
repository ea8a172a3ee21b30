"""The part Compare: methods under one budget, their cost before, their trials, the verdict."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from lorakin.compare.shared_fields import OF_A_RECIPE
from lorakin.errors import OutputError, SettingError, StateError
from lorakin.terminal import Terminal, command
from lorakin.training.run_files import LOG
from lorakin.ui import jobs, recipe_form, runs
from lorakin.ui.answered import answered, command_box, follow, note, place_for_problems
from lorakin.ui.changes import change_of, emptied_by_edits
from lorakin.ui.data_part import FIELDS, DataInputs
from lorakin.ui.look_part import framed
from lorakin.ui.ticks import Ticks
from lorakin.ui.warm import is_done

if TYPE_CHECKING:
    from lorakin.compare.comparison import Comparison

MORE = tuple(name for name in OF_A_RECIPE if name not in FIELDS)
"""Fields that all trials share and that the part Data does not have."""
OWN = {
    "budget": ("steps=200", "", "Of each trial: steps=… or minutes=…; perhaps params=…."),
    "seeds": ("3", "", "Runs of each method at its best learning rate."),
    "lr-sweep": ("auto", "", "Learning rates to try: auto, or rates such as 1e-4,3e-4."),
    "rank": ("", "16", "Rank at which methods are compared."),
    "metric": ("", "the task's own", "What decides: loss, or a metric of the task."),
    "eval-data": ("", "split off the data", "Rows to report on."),
}
"""Options of `lorakin compare` besides the methods → what the form says, the default in words, the
help."""
TITLES = ("trial", "state", "tuning loss", "held-out loss", "seconds")
REPORT = "report.html"


def build(data: DataInputs, folder: Path, ticks: Ticks, tab: Any) -> Any:
    """Builds the part in a tab; returns the component that chooses methods."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            out = recipe_form.out_input("comparison", folder, "compare-out", "a directory")
            methods = recipe_form.methods_input("compare-methods")
            own = {
                name: gr.Textbox(
                    value,
                    label=name.replace("-", " "),
                    placeholder=default or value,
                    info=info,
                    elem_id=f"compare-{name}",
                )
                for name, (value, default, info) in OWN.items()
            }
            with gr.Accordion("More", open=False):
                fields = {
                    name: recipe_form.input_of(name, elem_id=f"compare-{name}") for name in MORE
                }
        with gr.Column(scale=3, min_width=300):
            problem = place_for_problems()
            line = command_box("compare-command")
            cost = gr.Button("What it costs", elem_id="cost")
            costs = gr.Textbox(label="The cost", lines=4, interactive=False, elem_id="costs")
            start = gr.Button("Start or resume", variant="primary", elem_id="compare")
            refused = place_for_problems()
    of_data = [
        component
        for name, component in zip(data.names, data.components, strict=True)
        if name in OF_A_RECIPE
    ]
    names = (*(name for name in data.names if name in OF_A_RECIPE), *fields)
    inputs = [data.model, data.data, out, methods, *own.values(), *of_data, *fields.values()]
    of_this = [out, methods, *own.values(), *fields.values()]

    def words(*values: Any) -> list[str]:
        _comparison(names, "unused", *values)  # what is out of its range is said here
        return _words(folder, names, *values)

    changes = [change_of([data.model, data.data, *of_data])]
    changes += [component.change for component in of_this]
    gr.on(
        [tab.select, *changes],
        answered(lambda *values: (command("lorakin", *words(*values)),), 1), inputs,
        [line, problem], show_progress="hidden", trigger_mode="always_last",
    )  # fmt: skip
    # What it costs was said of another command. Fields also change when their choices come.
    line.change(None, outputs=[costs], js="() => ''", show_progress="hidden")
    cost.click(answered(lambda *values: (_cost(names, *values),), 1), inputs, [costs, refused])
    emptied_by_edits(refused, inputs)
    chosen = _build_trials(folder, ticks)
    start.click(
        answered(lambda *values: _started(words(*values)), 1, keeps=True), inputs, [chosen, refused]
    )
    return methods


def _build_trials(folder: Path, ticks: Ticks) -> Any:
    """Builds the trials of a comparison; returns the component that chooses one."""
    gr.Markdown("## Comparisons")
    with gr.Row():
        chosen = gr.Dropdown([], label="comparison", min_width=300, elem_id="comparison")
        pause = gr.Button("Pause", elem_id="compare-pause")
        show = gr.Button("Show the report", elem_id="report")
    problem = place_for_problems()
    state = gr.HTML("", elem_id="compare-state", padding=False)
    table = gr.Dataframe(
        headers=list(TITLES), label="Trials", interactive=False, wrap=True, elem_id="trials"
    )
    log = gr.Textbox(
        label="What it prints", lines=8, max_lines=16, interactive=False, elem_id="compare-log"
    )
    follow(log)
    report = gr.HTML("", elem_id="compare-report")
    look = ticks.follow(
        lambda name: _there_now(folder, name), _shown, [chosen], [chosen, state, table, log]
    )
    chosen.input(**look, show_progress="hidden")
    chosen.change(lambda: "", outputs=[problem], show_progress="hidden")  # it was of another one
    pause.click(answered(lambda name: _paused(folder, name), 0), [chosen], [problem])
    show.click(answered(lambda name: (_report(folder, name),), 1), [chosen], [report, problem])
    return chosen


def _there_now(folder: Path, chosen: str | None) -> tuple[Any, ...]:
    """Returns the comparisons' names, the one that is shown, its state, trials and log."""
    found = {run.name: run for run in runs.listed(folder) if run.kind == runs.COMPARISON}
    name = chosen if chosen in found else next(iter(found), None)
    if name is None:
        return [], None, "", [], ""
    run = found[name]
    state = f"{run.name}: {run.state}" + (f". {run.reason}" if run.reason else "")
    return [*found], name, note(state), trials(run.path), runs.log_of(run.path / LOG)


def _shown(names: list[str], chosen: str | None, *values: Any) -> tuple[Any, ...]:
    return (gr.Dropdown(names, value=chosen), *values)


def trials(path: Path) -> list[list[str]]:
    """Returns the trials of a comparison that have ended: the cells under `TITLES`."""
    rows: list[list[str]] = []
    if not is_done():
        return rows
    from lorakin.compare.results import ResultRow

    try:
        lines = (path / runs.RESULTS).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return rows
    for line in (line for line in lines if line.endswith("\n")):  # the last may be in writing
        with contextlib.suppress(ValueError, RecursionError):
            row = ResultRow.from_json(line)
            state = f"{row.status}: {row.reason}" if row.reason else row.status
            losses = [f"{of['loss']:.4f}" if of else "" for of in (row.tune, row.report)]
            rows.append([row.trial.name, state, *losses, f"{row.seconds:.0f}"])
    return rows


def _words(folder: Path, names: Sequence[str], *values: Any) -> list[str]:
    model, data, out, methods, *rest = values
    own, fields = rest[: len(OWN)], rest[len(OWN) :]
    words = ["compare", "--model", _given("model", model), "--data", _given("data", data)]
    words += ["--methods", " ".join(methods)] if methods else []
    for name, value in zip(OWN, own, strict=True):
        words += [f"--{name}", str(value).strip()] if str(value or "").strip() else []
    words += recipe_form.words_of(recipe_form.raw_of(names, fields))
    return [*words, "--out", str(runs.place(folder, out or ""))]


def _given(name: str, value: str | None) -> str:
    text = (value or "").strip()
    if not text:
        raise SettingError(f"{name} is missing; name it at the head of the page")
    if "\n" in text:
        raise SettingError(f"a comparison takes one {name}, and these are several lines: {text!r}")
    return text


def _comparison(names: Sequence[str], place: str, *values: Any) -> Comparison:
    """Returns the comparison that the form stands for, in the directory `place`.

    Raises:
        SettingError: a value is out of its range.
    """
    from lorakin.compare.comparison import Comparison
    from lorakin.family.method_words import methods_of

    model, data, _, methods, *rest = values
    given = zip(OWN, rest[: len(OWN)], strict=True)
    own = {name: str(value or "").strip() for name, value in given}
    fields = recipe_form.fields_of(recipe_form.raw_of(names, rest[len(OWN) :]))
    return Comparison(
        model=_given("model", model), data=_given("data", data), out=place,
        methods=methods_of(" ".join(methods or ["all"])), budget=own["budget"] or "steps=200",
        seeds=_whole("seeds", own["seeds"] or "3"), sweep=own["lr-sweep"] or "auto",
        eval_data=own["eval-data"] or None, metric=own["metric"] or None,
        rank=_whole("rank", own["rank"]) if own["rank"] else None, recipe=fields,
    )  # fmt: skip


def _cost(names: Sequence[str], *values: Any) -> str:
    from lorakin.compare.preparation import prepare

    with tempfile.TemporaryDirectory() as scratch:
        comparison = _comparison(names, f"{scratch}/comparison", *values)
        prepared = prepare(comparison, Terminal(quiet=True))
        count, parts = prepared.expected(), prepared.parts
    lines = [f"about {count} trials, {comparison.parsed_budget} each"]
    if (steps := comparison.parsed_budget.steps) is not None:
        lines[0] += f": {count * steps:,} optimizer steps in all"
    lines.append(
        f"{parts.train:,} rows to train on, {parts.tune} to choose learning rates by, "
        f"{parts.report} to report on"
    )
    arms = [arm.title + f" (left out: {arm.refused})" * bool(arm.refused) for arm in prepared.arms]
    lines.append(f"arms: {', '.join(arms)}")
    return "\n".join(lines)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SettingError(f"--{name} must be a whole number, not {text!r}") from None


def _started(words: list[str]) -> tuple[Any]:
    out = Path(words[-1])
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file, expected a directory")
    jobs.start(words, out / LOG)
    return (gr.Dropdown([out.name], value=out.name),)


def _paused(folder: Path, name: str | None) -> tuple[Any, ...]:
    jobs.interrupt(runs.chosen(folder, name))
    return ()


def _report(folder: Path, name: str | None) -> str:
    path = runs.chosen(folder, name) / REPORT
    try:
        return framed(path.read_text(encoding="utf-8"), f"The report of {name}")
    except OSError:
        raise StateError(f"{path} is not there yet; it is written when trials end") from None
