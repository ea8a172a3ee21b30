"""What the user is told about a run: its data, its model, one example, and its figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from lorakin.family import Method
from lorakin.inject.counts import parameter_counts
from lorakin.inject.description import count, share
from lorakin.storage.summary import by_layer
from lorakin.terminal import labelled, visible
from lorakin.training import processes, reading
from lorakin.training.alarms import repeated, warn
from lorakin.training.epoch import EpochFigures
from lorakin.training.evaluate import described
from lorakin.training.reading import DataRows
from lorakin.training.run import Ending, PreparedRun
from lorakin.training.tasks import Evaluation


def show_rows(console: Console, rows: DataRows, held_out: DataRows, streams: bool = False) -> None:
    """Shows what was read, and which of it is not used; of data that streams it is a sample."""
    sample = "read while training, of which this is the beginning: " if streams else ""
    line = f"{rows.name}: {sample}{reading.summary(rows)}; {len(held_out)} held out"
    console.print(labelled("data   ", line))
    if (left := reading.unused(rows)) is not None:
        console.print(RichText(visible("       " + left), style="yellow"))


def show_run(run: PreparedRun) -> None:
    """Shows what will be trained on what, with one example and where its loss is taken."""
    recipe, console = run.recipe, run.console
    console.print(labelled("model  ", _model_line(run)))
    if recipe.packing or recipe.group_by_length or recipe.data_weights:
        _show_epoch(run)
    if run.task.note:
        console.print(labelled("task   ", _task_line(run)))
    gpus = torch.cuda.device_count()
    if gpus > 1 and processes.count() == 1 and run.loaded.model.device.type == "cuda":
        console.print(labelled(f"1 of {gpus} GPUs", " is used; --gpus all uses all", "yellow"))
    if twice := repeated(run.train.examples, run.held_out.examples):
        warn(
            console,
            f"{twice} of {len(run.held_out.examples)} held-out rows are trained on, too: the "
            "held-out figures will look better than they are. Remove duplicate rows, or "
            "give other rows with --eval-data",
        )
    if run.train.dropped:
        why = f": no answer, or none within {recipe.max_length} tokens"
        console.print(labelled(f"{run.train.dropped:,} rows dropped", why, "yellow"))
    if run.train.cut:
        why = f" at {recipe.max_length} tokens (--max-length): their last answers do not end"
        console.print(labelled(f"{run.train.cut:,} rows are cut", why, "yellow"))
    what = " as the model will see it; the loss is taken on the green part, in ⟦ ⟧:"
    console.print(labelled("one example", what))
    console.print(run.task.rendered(run.train.examples[0], run.loaded.tokenizer))


def _show_epoch(run: PreparedRun) -> None:
    figures, name = EpochFigures.of(run.epoch, run.recipe), "epoch  "
    if run.stream is not None:
        figures, name = dataclasses.replace(figures, of_sources=None), "sample "
    for line in figures.lines():
        run.console.print(labelled(name, line))


def _task_line(run: PreparedRun) -> str:
    start = run.recipe.adapter
    reference = "the base" if start is None else f"{_public_name(start)} as it began"
    return run.task.line(reference)


def _model_line(run: PreparedRun) -> str:
    recipe, placement = run.recipe, run.adapter.placement
    trained, total = parameter_counts(run.loaded.model)
    parts = [f"{recipe.method} on {len(placement.methods)} modules"]
    if placement.whole_modules:
        parts.append(f"{', '.join(placement.whole_modules)} trained whole")
    if recipe.trainable_tokens:
        parts.append(f"rows of {len(recipe.trainable_tokens)} tokens")
    if placement.biases:
        parts.append(f"{len(placement.biases)} biases")
    where = f"in {recipe.quantize or recipe.dtype} on {run.loaded.model.device}"
    return f"{recipe.model} {where}; {', '.join(parts)}; {share(trained, total)} train"


def importance_table(method: Method, found: Mapping[str, float]) -> Table:
    """Returns a table of importances by layer and module; ● marks modules with a pair of their own.

    Args:
        method: the method, with these importances.
        found: path of a module → its share of the importance, in [0, 1].
    """
    own = set(method.with_own_pair(list(found)))
    marks = {path: ("●", "bold green") if path in own else (" ", "") for path in found}
    cells = {
        path: RichText(f"{100 * share:.2f}{marks[path][0]}", marks[path][1])
        for path, share in found.items()
    }
    rows = by_layer(cells)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    title = f"importance in %: {len(own)} of {len(found)} modules keep a pair of their own (●)"
    table = Table("layer", title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name.rpartition(".")[2], justify="right", no_wrap=True)
    for layer, row in rows.items():
        table.add_row(layer, *(row.get(name, "") for name in columns))
    return table


def _public_name(name: str) -> str:
    """Returns the last part of a path, since a path on this machine is private, or a hub id."""
    return Path(name).name if Path(name).exists() else name


def notes(
    run: PreparedRun, before: Evaluation, after: Evaluation, ending: Ending
) -> dict[str, str]:
    """Returns what the adapter's model card says about the run."""
    recipe = run.recipe
    sources = [_public_name(name) for name in recipe.data]
    trained = f"{len(run.train.examples):,} rows" if run.stream is None else "read while training"
    rows = f"{trained}, {len(run.held_out.examples):,} held out"
    unit = "packed sequence" if recipe.packing else "row"
    steps = f"{count(ending.steps, 'step')} of {count(run.rows_per_step, unit)}"
    began = {} if recipe.adapter is None else {"Trained further": _public_name(recipe.adapter)}
    task = {"Task": _task_line(run)} if run.task.note else {}
    notes_of_run = {
        **began,
        **task,
        "Data": f"{', '.join(sources)}: {rows}",
        "Training": f"{steps} with AdamW, learning rate {recipe.lr:g}, {recipe.schedule} schedule, "
        f"in {recipe.quantize or recipe.dtype}, seed {recipe.seed}",
        **({"Ended": ending.words} if ending.words else {}),
        "Held out before": described(before),
        "Held out after": described(after),
    }
    return (
        notes_of_run
        if len(run.task.labels or ()) < 2
        else {**notes_of_run, "Classes": ", ".join(run.task.labels or ())}
    )
