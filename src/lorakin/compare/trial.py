"""Runs one trial of a comparison in a process of its own, and measures it."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lorakin.compare import observe
from lorakin.compare.report_answers import ReportAnswers
from lorakin.compare.results import (
    DIVERGED,
    DONE,
    FAILED,
    REFUSED,
    TIMING,
    UNTRAINED,
    ResultRow,
    Trial,
)
from lorakin.errors import DivergedError, LorakinError, LorakinWarning
from lorakin.storage.summary import importance_in
from lorakin.terminal import Terminal
from lorakin.training import train
from lorakin.training.metrics_file import Metrics
from lorakin.training.prepare import encoded
from lorakin.training.progress import memory_bytes, peak_memory_bytes
from lorakin.training.reading import read_rows
from lorakin.training.recipe import Recipe
from lorakin.training.run_directory import METRICS
from lorakin.training.tasks import Evaluation

TIMED_STEPS = 6
"""The number of steps of a trial that only times a step."""


@dataclasses.dataclass(frozen=True)
class TrialJob:
    """What a trial's process needs to know.

    Attributes:
        trial: the arm, learning rate and seed.
        recipe: the training run.
        report_data: the path of the rows to report on.
        device: "cpu", or a GPU such as "cuda:0".
        threads: the number of CPU threads.
        keep: whether the adapter stays on disk.
    """

    trial: Trial
    recipe: Recipe
    report_data: str
    device: str
    threads: int
    keep: bool


def serve(job: TrialJob, sender: Connection, lifeline: Connection) -> None:
    """Runs the trial and sends its row; the main function of a trial's process.

    What the trial prints goes into a log beside its directory. The process exits when the other
    end of `lifeline` closes, so that a comparison that is killed leaves no trial running.
    """
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison handles Ctrl-C
    gc.freeze()  # the garbage collector need not look at what was imported before the fork
    _choose_device(job)
    log = Path(f"{job.recipe.out}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        sender.send(run(job))
        sender.close()


def _end_with(lifeline: Connection) -> None:
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)


def run(job: TrialJob) -> ResultRow:
    """Runs the trial and returns its row, however it ends."""
    out, row = Path(job.recipe.out), ResultRow(job.trial, FAILED, device=job.device)
    shutil.rmtree(out, ignore_errors=True)  # what a killed trial left
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LorakinWarning)
            run_stage = _evaluate_untrained if job.trial.stage == UNTRAINED else _train
            row = run_stage(job, row)
    except DivergedError as error:
        row = dataclasses.replace(
            row,
            status=DIVERGED,
            reason=str(error).partition(";")[0],
            losses=_losses(out),
            steps=error.step,
        )
    except LorakinError as error:
        row = dataclasses.replace(row, status=REFUSED, reason=str(error))
    except Exception as error:  # the comparison continues whatever happens
        traceback.print_exc()  # into the log
        row = dataclasses.replace(row, reason=f"{type(error).__name__}: {error}")
    finally:
        if not job.keep:
            shutil.rmtree(out, ignore_errors=True)
    messages = [
        str(warning.message) for warning in caught if issubclass(warning.category, LorakinWarning)
    ]
    return dataclasses.replace(
        row, warnings=list(dict.fromkeys(messages)), seconds=round(time.perf_counter() - started, 2)
    )


def _train(job: TrialJob, row: ResultRow) -> ResultRow:
    """Trains, and returns the row with its figures."""
    before = memory_bytes()
    unknown = Evaluation(float("nan"), 0)  # another trial evaluates the base
    prepared = train.prepare(job.recipe, Terminal())
    observer = observe.Observer(prepared.adapter)
    result = train.train(prepared, before=unknown, callbacks=[observer])
    # On a GPU the peak counts tensors alone; on a CPU, the whole process.
    added = peak_memory_bytes() - (0 if torch.cuda.is_available() else before)
    row = dataclasses.replace(
        row,
        status=DONE,
        steps=result.steps,
        peak_bytes=max(0, added),
        **observer.step_times,  # type: ignore[arg-type]
    )
    if job.trial.stage == TIMING:
        return row

    importance, adapter = importance_in(prepared.out), prepared.adapter
    report = _report(job, prepared)
    paths = list(adapter.placement.methods)
    return dataclasses.replace(
        row,
        tune=result.after.as_dict(),
        report=report.as_dict(),
        answers=ReportAnswers.of(report),
        trained=result.trainable_parameters,
        frozen=sum(p.numel() for p in adapter.parameters() if not p.requires_grad),
        adapter_bytes=result.adapter_bytes,
        losses=_losses(prepared.out),
        curve=_curve(prepared.out),
        layers=_rounded(observe.change_norms(adapter)),
        moves=_rounded(
            [
                *observer.moves,
                (result.steps, observe.magnitude_direction_changes(adapter)),
            ]
        ),
        ranks=observer.ranks,
        importance=_rounded(importance),
        own=adapter.placement.method.with_own_pair(paths) if importance else [],
    )


def _evaluate_untrained(job: TrialJob, row: ResultRow) -> ResultRow:
    """Evaluates the model without its adapter."""
    prepared = train.prepare(job.recipe, Terminal())
    with prepared.adapter.disabled():
        tune, report = prepared.evaluate(), _report(job, prepared)
    return dataclasses.replace(
        row,
        status=DONE,
        tune=tune.as_dict(),
        report=report.as_dict(),
        answers=ReportAnswers.of(report),
    )


def _report(job: TrialJob, prepared: train.PreparedRun) -> Evaluation:
    """Evaluates the model on the rows to report on."""
    recipe, loaded = prepared.recipe, prepared.loaded
    data = read_rows(job.report_data, layout=recipe.format, task=prepared.task.word)
    rows = encoded(recipe, data, loaded, prepared.task)
    return prepared.task.evaluate(
        loaded.model, prepared.collator(), rows.examples, recipe.batch_size
    )


def _losses(out: Path) -> list[float]:
    """Returns the training loss of each step."""
    rows = Metrics(out / METRICS, writes=False).rows()
    return [round(row["loss"], 5) for row in rows if "loss" in row]


def _curve(out: Path) -> list[tuple[int, float]]:
    """Returns the loss on the tuning rows at each evaluation during the run."""
    rows = Metrics(out / METRICS, writes=False).rows()
    return [
        (row["step"], round(row["eval_loss"], 5))
        for row in rows
        if "eval_loss" in row and row["step"]
    ]


def _rounded(value: Any) -> Any:
    """Rounds numbers to four digits: charts show no more, and the file stays small."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _choose_device(job: TrialJob) -> None:
    """Hides other devices from torch, before it looks for them."""
    kind, _, number = job.device.partition(":")
    os.environ["CUDA_VISIBLE_DEVICES"] = number or "0" if kind == "cuda" else ""
    torch.set_num_threads(job.threads)
