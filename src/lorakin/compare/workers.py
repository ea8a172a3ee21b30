"""Runs the trials of a comparison, one at a time on each device, each in a separate process.

A process pool would not do: it reuses its processes, and a trial that is killed for lack of memory
would break it. Here each trial has a fresh process, so that its memory can be measured, and if the
process dies, only that trial is lost.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lorakin.compare import trial
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.progress import Board
from lorakin.compare.results import FAILED, ResultRow, Trial
from lorakin.errors import SettingError
from lorakin.family.settings import require


def devices_of(text: str) -> list[str]:
    """Reads devices from the command line; one that is named twice runs two trials at a time.

    >>> devices_of("cpu,cpu")
    ['cpu', 'cpu']

    Args:
        text: such as "cuda:0,cuda:1"; "auto" is all GPUs, or else the CPU.

    Raises:
        SettingError: there is no such device, or the text names none.
    """
    gpus = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    if text == "auto":
        return gpus or ["cpu"]
    devices = [part.strip() for part in text.split(",") if part.strip()]
    for device in devices:
        if device not in ("cpu", *gpus):
            raise SettingError(
                f"--devices {text!r}: there is no {device!r} here; choose from "
                f"{', '.join(('cpu', *gpus))}"
            )
    require(
        bool(devices),
        f"--devices {text!r} names no device; give some, such as cuda:0,cuda:1 or cpu,cpu",
    )
    return devices


PRELOADED = ["lorakin.compare.forked", trial.__name__, "matplotlib.pyplot"]
"""Imported once, and forked into every trial."""


@dataclasses.dataclass
class TrialProcess:
    """A trial that runs. Its process exits when `lifeline` closes, so also when this one ends."""

    trial: Trial
    process: Any
    receiver: multiprocessing.connection.Connection
    lifeline: multiprocessing.connection.Connection

    def row(self, device: str) -> ResultRow:
        """Returns the row that the process sent; if it died, a row that says how."""
        try:
            row: ResultRow = self.receiver.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            why = ", killed, perhaps for lack of memory" if code == -9 else ""
            reason = f"its process ended with exit code {code}{why}; see its log"
            row = ResultRow(self.trial, FAILED, reason, device=device)
        self.process.join()
        self.lifeline.close()
        return row


def run(comparison_run: PreparedComparison, devices: Sequence[str], board: Board) -> None:
    """Runs the remaining trials, one at a time on each device, and records each row.

    When it ends, by an error or Ctrl-C too, no trial is left running.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(PRELOADED)
    threads = max(1, torch.get_num_threads() // max(1, list(devices).count("cpu")))
    running: dict[int, TrialProcess] = {}
    try:
        while True:
            busy = [process.trial for process in running.values()]
            waiting = [trial for trial in comparison_run.remaining() if trial not in busy]
            free = [index for index in range(len(devices)) if index not in running]
            for index, next_trial in zip(free, waiting, strict=False):
                job = comparison_run.trial_job(next_trial, devices[index], threads)
                running[index] = _start(context, job)

            board.show(comparison_run, [process.trial for process in running.values()])
            if not running:
                return

            ready = multiprocessing.connection.wait(
                [process.receiver for process in running.values()], timeout=1.0
            )
            for index in [index for index, process in running.items() if process.receiver in ready]:
                row = running.pop(index).row(devices[index])
                comparison_run.record_result(row)
                board.finished(comparison_run, row)
    finally:
        for process in running.values():
            process.process.kill()
            process.process.join()


def _start(context: Any, job: trial.TrialJob) -> TrialProcess:
    """Starts the job's process."""
    receiver, sender = context.Pipe(duplex=False)
    childs_end, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=trial.serve, args=(job, sender, childs_end), daemon=True)
    process.start()
    # Then the child holds the only other end of each pipe, and its death closes them.
    for end in (sender, childs_end):
        end.close()
    return TrialProcess(job.trial, process, receiver, lifeline)
