"""The part Train: the form of a recipe, what it stands for, and the runs that there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lorakin.terminal import command
from lorakin.training.recipe_file import as_yaml, read_recipe
from lorakin.training.recipe_option import DATA, PANELS
from lorakin.training.requests import PAUSE, STOP, Request, ask
from lorakin.training.run_files import LOG
from lorakin.ui import curves, data_part, jobs, recipe_form, runs
from lorakin.ui.answered import answered, command_box, follow, place_for_problems
from lorakin.ui.changes import change_of, emptied_by_edits
from lorakin.ui.data_part import DataInputs
from lorakin.ui.ticks import Ticks

OPEN = ("method", "rank", "lr", "steps", "epochs", "batch_size")
GROUPS = {panel: recipe_form.group((*OPEN, "out"), panel) for panel in PANELS if panel != DATA}
TITLES = ("run", "state", "method", "step", "loss", "held out", "notes")
CHANGES = "The command and the recipe that the form stands for:"


def build(data: DataInputs, folder: Path, ticks: Ticks, tab: Any) -> Any:
    """Builds the part; returns the component that chooses the method.

    Args:
        data: what the part Data says of the data.
        folder: the folder of the runs.
        ticks: says when the directories are to be read again.
        tab: the tab in which it is built.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            name = recipe_form.out_input("adapter", folder, "field-out")
            fields = {field: recipe_form.input_of(field) for field in OPEN}
            for panel, names in GROUPS.items():
                with gr.Accordion(panel, open=False):
                    fields |= {field: recipe_form.input_of(field) for field in names}
        with gr.Column(scale=3, min_width=300):
            problem = place_for_problems()
            gr.Markdown(CHANGES)
            line = command_box("train-command")
            recipe = gr.Code(
                label="The recipe", language="yaml", interactive=False, lines=8, wrap_lines=True,
                elem_id="train-recipe",
            )  # fmt: skip
            start = gr.Button("Start", variant="primary", elem_id="start")
            refused = place_for_problems()
    told_names = (*data.names, *fields)
    inputs = [name, *data.components, *fields.values()]
    told: dict[str, Any] = {
        "fn": answered(lambda *values: _described(folder, told_names, *values), 2),
        "inputs": inputs, "outputs": [line, recipe, problem], "trigger_mode": "always_last",
        "show_progress": "hidden",
    }  # fmt: skip
    own = [name, *fields.values()]
    changes = [change_of(data.components), *(component.change for component in own)]
    gr.on([tab.select, *changes], **told)
    emptied_by_edits(refused, inputs)
    chosen = _build_runs(folder, ticks)
    start.click(
        answered(lambda *values: _started(folder, told_names, *values), 1, keeps=True),
        inputs,
        [chosen, refused],
    )
    return fields[recipe_form.METHOD]


def _build_runs(folder: Path, ticks: Ticks) -> Any:
    """Builds the list of runs, with curves; returns the component that chooses one."""
    gr.Markdown("## Runs")
    table = gr.Dataframe(
        headers=list(TITLES), label="Runs, the latest first", interactive=False, wrap=True,
        elem_id="runs",
    )  # fmt: skip
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            chosen = gr.Dropdown([], label="run", info="The run that is shown.", elem_id="run")
            beside = gr.CheckboxGroup([], label="beside it", info="Other runs in its curves.")
            with gr.Row():
                pause = gr.Button("Pause", elem_id="pause")
                resume = gr.Button("Resume", elem_id="resume")
                stop = gr.Button("Stop and keep", elem_id="stop")
            problem = place_for_problems()
            log = gr.Textbox(
                label="What it prints", lines=8, max_lines=16, interactive=False, elem_id="log"
            )
        with gr.Column(scale=3, min_width=300):
            plots = [
                gr.Plot(label=title, show_label=False, elem_id=f"curve-{number}")
                for number, title in enumerate(curves.CURVES)
            ]
    follow(log)
    look = ticks.follow(
        lambda *values: _there_now(folder, *values),
        lambda *found: _shown(folder, *found),
        [chosen, beside],
        [table, chosen, beside, log, *plots],
    )
    for component in (chosen, beside):
        component.input(**look, show_progress="hidden")
    chosen.change(lambda: "", outputs=[problem], show_progress="hidden")  # it was of another one
    pause.click(answered(_asking(folder, PAUSE), 0), [chosen], [problem])
    stop.click(answered(_asking(folder, STOP), 0), [chosen], [problem])
    resume.click(answered(lambda run: _resumed(folder, run), 0), [chosen], [problem])
    return chosen


def _there_now(folder: Path, chosen: str | None, beside: Sequence[str]) -> tuple[Any, ...]:
    """Returns the runs, the one that is shown, those beside it, and what the shown one prints."""
    found = [run for run in runs.listed(folder) if run.kind == runs.TRAINING]
    names = [run.name for run in found]
    chosen = chosen if chosen in names else (names[0] if names else None)
    beside = [name for name in beside if name in names and name != chosen]
    return found, chosen, beside, runs.log_of(folder / chosen / LOG) if chosen else ""


def _shown(
    folder: Path, found: Sequence[runs.ListedRun], chosen: str | None, beside: list[str], log: str
) -> tuple[Any, ...]:
    names = [run.name for run in found]
    drawn = [folder / name for name in ([chosen] if chosen else []) + beside]
    return (
        [_cells(run) for run in found],
        gr.Dropdown(names, value=chosen),
        gr.CheckboxGroup([name for name in names if name != chosen], value=beside),
        log,
        *curves.charts_of(drawn),
    )


def _cells(run: runs.ListedRun) -> list[str]:
    figures = ["" if value is None else f"{value:.4f}" for value in (run.loss, run.held_out)]
    return [run.name, run.state, run.method, str(run.step), *figures, run.reason]


def _words(folder: Path, name: str | None, raw: dict[str, Any]) -> list[str]:
    out = runs.place(folder, name or "")
    return ["train", *recipe_form.words_of(raw), "--out", str(out)]


def _recipe(folder: Path, names: Sequence[str], name: str, *values: Any) -> tuple[list[str], Any]:
    """Returns the words of the command, and the recipe that they stand for."""
    raw = recipe_form.raw_of(names, values)
    data_part.check_named(raw)
    words = _words(folder, name, raw)
    recipe = read_recipe(None, recipe_form.fields_of(raw) | {"out": words[-1]})
    recipe.build()  # a method that is not one is said here
    return words, recipe


def _described(folder: Path, names: Sequence[str], name: str, *values: Any) -> tuple[str, str]:
    words, recipe = _recipe(folder, names, name, *values)
    return command("lorakin", *words), as_yaml(recipe)


def _started(folder: Path, names: Sequence[str], name: str, *values: Any) -> tuple[Any]:
    from lorakin.training.run_directory import lock_run_directory

    words, recipe = _recipe(folder, names, name, *values)
    out = Path(recipe.out)
    # What the command would refuse is refused here, before a process is started.
    lock_run_directory(recipe, out, resume=False).release()
    jobs.start(words, out / LOG)
    return (gr.Dropdown([out.name], value=out.name),)


def _asking(folder: Path, request: Request) -> Callable[[str | None], tuple[Any, ...]]:
    def handler(run: str | None) -> tuple[Any, ...]:
        ask(runs.chosen(folder, run), request)
        return ()

    return handler


def _resumed(folder: Path, run: str | None) -> tuple[Any, ...]:
    from lorakin.training.run_directory import lock_run_directory, resumed_recipe

    out = runs.chosen(folder, run)
    recipe = resumed_recipe(None, {"out": str(out)})
    lock_run_directory(recipe, out, resume=True).release()
    jobs.start(["train", "--resume", "--out", str(out)], out / LOG)
    return ()
