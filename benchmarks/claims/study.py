"""Runs the trials of the study. Each task is one comparison; what ended is not run again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.claims import archive
from benchmarks.claims import arms as more
from benchmarks.claims.tasks import Task
from lorakin.compare import next_trials, workers
from lorakin.compare.arms import Arm
from lorakin.compare.comparison import Comparison
from lorakin.compare.directory import locked
from lorakin.compare.preparation import prepare
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.progress import Board
from lorakin.compare.results import DONE

SEEDS = 5
PILOT_SEEDS = 3
EVALUATIONS = 8
"""How often a trial evaluates on the tuning rows."""


def comparison_of(task: Task, data: str, out: Path) -> Comparison:
    """Returns the task's comparison, and writes its rows unless they are there."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{task.name}_{part}.jsonl" for part in ("train", "report")]
    if not all(file.is_file() for file in files):
        for file, rows in zip(files, task.parts(data), strict=True):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Comparison(
        model=task.model,
        data=str(files[0]),
        eval_data=str(files[1]),
        out=str(out / task.name),
        methods=[*more.MEMBERS, *more.STARTS],
        budget=f"steps={task.steps}",
        seeds=SEEDS,
        metric=task.chosen_by,
        recipe={**task.recipe, "eval_every": max(1, task.steps // EVALUATIONS)},
    )


def prepared(task: Task, data: str, out: Path, console: Console) -> PreparedComparison:
    """Returns the task's comparison with all arms of the study."""
    run = prepare(comparison_of(task, data, out), console)
    by_name = {arm.name: arm for arm in run.arms}
    run.arms += more.sizes(by_name["lora"], by_name["dora"], task.model)
    run.arms += _random(run, by_name["lora-drop"])
    return run


def restore(task: Task, data: str, out: Path, console: Console) -> None:
    """Writes the committed trials into the study's directory, unless it holds trials.

    The study can then go on, on another machine too.

    Raises:
        SystemExit: the data is not that of the committed trials.
    """
    with locked(comparison_of(task, data, out)):
        run = prepare(comparison_of(task, data, out), console)
        if run.results.rows or not archive.path_of(task.name).is_file():
            return
        kept = archive.load(task.name)
        for part in ("train", "tune", "report"):
            here, there = getattr(run.parts, part), kept.how[part]
            if here != there:
                raise SystemExit(
                    f"{task.title}: {data} gives {here:,} rows to {part}, and the committed "
                    f"trials had {there:,}: it is other data"
                )
        places = json.dumps(kept.how["places"])
        (out / task.name / archive.RESTORED).write_text(places, encoding="utf-8")
        for row in kept.rows:
            run.results.add(row)


def _random(run: PreparedComparison, drop: Arm) -> list[Arm]:
    """Returns the arms with modules at random, once LoRA-drop's own sweep is done."""
    rows = next_trials.rows_at_best_rate(drop.name, run.results.rows, run.measure)
    first = next((row for row in rows if row.status == DONE and row.importance), None)
    if first is None:
        return []
    return more.random_modules(drop, list(first.importance), len(first.own))


def run_task(
    task: Task,
    data: str,
    out: Path,
    names: Sequence[str] | None,
    seeds: int,
    devices: str,
    console: Console,
) -> PreparedComparison:
    """Runs what is missing of a task's arms, and returns the comparison.

    Args:
        task: the task.
        data: the folder with the data, or "hub".
        out: the study's directory.
        names: the arms' names; None for all.
        seeds: how many of the study's seeds are run now.
        devices: where trials run, as in `lorakin compare --devices`.
        console: where progress is shown.
    """
    places = workers.devices_of(devices)
    with locked(comparison_of(task, data, out)):
        # Modules at random are known once LoRA-drop has chosen its own.
        for _ in range(2):
            whole = prepared(task, data, out, console)
            wanted = [arm for arm in whole.arms if names is None or arm.name in names]
            now = dataclasses.replace(
                whole, arms=wanted, comparison=dataclasses.replace(whole.comparison, seeds=seeds)
            )
            with Board(console, len(places)) as board:
                workers.run(now, places, board)
    return whole
