"""The study's trials as they stand: from its directory while it runs, from the archive afterwards."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import lorakin
from benchmarks.claims import archive
from benchmarks.claims.analysis import Evidence
from benchmarks.claims.study import comparison_of, prepared
from benchmarks.claims.tasks import TASKS, Task
from lorakin.compare.arms import CONTROL, LIMIT, MEMBER, REFERENCE, Arm
from lorakin.compare.directory import locked
from lorakin.compare.next_trials import sweep_figures
from lorakin.compare.results import ResultRow
from lorakin.compare.standings import standings_of

ARM_FIELDS = ("name", "title", "kind", "words", "rank", "scaling", "lr", "explains")
"""What the archive says of an arm."""
LEAST_SEEDS = 2
KINDS = (REFERENCE, MEMBER, CONTROL, LIMIT)


def archived(task: Task, data: str, out: Path, day: str) -> archive.Archive:
    """Returns the trials in the study's directory with what the page says of them.

    Raises:
        OutputError: trials are running there.
    """
    with locked(comparison_of(task, data, out)):
        run = prepared(task, data, out, Console(quiet=True))
    restored = out / task.name / archive.RESTORED
    before = json.loads(restored.read_text(encoding="utf-8")) if restored.is_file() else []
    here = len(run.results.rows) - sum(place["trials"] for place in before)
    places = [*before, *([{"days": [day], "trials": here}] if here else [])]
    done = {row.trial.arm for row in run.results.rows}
    arms = [arm for arm in run.arms if arm.name in done]
    how = {
        "model": task.model,
        "measure": task.measure,
        "chosen_by": task.chosen_by,
        "steps": task.steps,
        "batch": task.recipe["batch_size"],
        "seeds": run.comparison.seeds,
        **{part: getattr(run.parts, part) for part in ("train", "tune", "report")},
        "dtype": run.dtype,
        "places": places,
        "machine": f"{platform.machine()}, one thread a trial",
        "versions": {m.__name__: m.__version__ for m in (lorakin, torch, transformers)},
        "arms": [{name: getattr(arm, name) for name in ARM_FIELDS} for arm in arms],
    }
    return archive.Archive(how, run.results.rows)


def evidence_of(task: Task, kept: archive.Archive) -> Evidence:
    """Returns where the arms of a task stand, from its archive."""
    arms = [Arm(**fields) for fields in kept.how["arms"]]
    arms.sort(key=lambda arm: KINDS.index(arm.kind))
    rows = archive.on_the_first_machine(kept, arms[0].name)
    found = standings_of(arms, rows, task.chosen_by)
    # Rates are chosen by one figure, and the arms judged by another.
    judged = standings_of(arms, _at(found, rows), task.measure)
    # An arm whose seeds have not run, or whose sweep goes on, is not judged yet.
    by_name = {s.arm.name: s for s in judged if s.arm.lr is None or len(s.done) >= LEAST_SEEDS}
    for s in found:
        if s.arm.name in by_name:
            by_name[s.arm.name] = dataclasses.replace(
                by_name[s.arm.name], lr=s.lr, at_edge=s.at_edge
            )
    names = [name for name, s in by_name.items() if s.lr is not None]
    sweeps = {name: sweep_figures(name, rows, task.chosen_by) for name in names}
    reported = {name: _reported(name, rows, task.measure) for name in names}
    # A rate may have given way to another since its adapter wrote.
    rates = {name: by_name[name].lr for name in names}
    written = [row for row in archive.load_written(task.name) if rates.get(row.arm) == row.lr]
    return Evidence(task, by_name, written, sweeps, reported)


def _reported(name: str, rows: Sequence[ResultRow], measure: str) -> dict[float, float]:
    """Returns rate → the measure on the rows to report on, of an arm's first seed."""
    return {
        row.trial.lr: row.report[measure]
        for row in rows
        if row.trial.arm == name and row.trial.seed == 0 and row.trial.lr and row.report
    }


def _at(found: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
    """Returns the trials at each arm's chosen rate."""
    rates = {s.arm.name: s.lr for s in found}
    return [row for row in rows if row.trial.lr == rates.get(row.trial.arm)]


def all_archived() -> list[tuple[Evidence, dict[str, Any]]]:
    """Returns the evidence of every task whose rows are committed, and how it was run."""
    kept = [(t, archive.load(t.name)) for t in TASKS if archive.path_of(t.name).is_file()]
    return [(evidence_of(task, one), one.how) for task, one in kept]
