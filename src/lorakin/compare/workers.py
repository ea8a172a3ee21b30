"""Runs the trials of a comparison, one at a time on each device, each in a process of its own.

A process pool would not do: it keeps its processes, and a trial that is killed for lack of memory
would break it. Here each trial has a fresh process, whose memory can be measured, and whose end
is the end of that trial alone.
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
from lorakin.compare.progress import Board
from lorakin.compare.results import FAILED, ResultRow, Trial
from lorakin.compare.study import Study
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
    cards = (
        [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    if text == "auto":
        return cards or ["cpu"]
    found = [part.strip() for part in text.split(",") if part.strip()]
    for device in found:
        if device not in ("cpu", *cards):
            raise SettingError(
                f"--devices {text!r}: there is no {device!r} here; choose from "
                f"{', '.join(('cpu', *cards))}"
            )
    require(
        bool(found),
        f"--devices {text!r} names no device; give some, such as cuda:0,cuda:1 or cpu,cpu",
    )
    return found


PRELOADED = [trial.__name__, "matplotlib.pyplot"]
"""Imported once, and forked into every trial."""


@dataclasses.dataclass
class Running:
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


def run(study: Study, devices: Sequence[str], board: Board) -> None:
    """Runs the remaining trials, one at a time on each device, and records each row.

    When it ends, by an error or Ctrl-C too, no trial is left running.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(PRELOADED)
    threads = max(1, torch.get_num_threads() // max(1, list(devices).count("cpu")))
    running: dict[int, Running] = {}
    try:
        while True:
            busy = [one.trial for one in running.values()]
            waiting = [what for what in study.remaining() if what not in busy]
            free = [slot for slot in range(len(devices)) if slot not in running]
            for slot, what in zip(free, waiting, strict=False):
                running[slot] = _started(context, study.job(what, devices[slot], threads))

            board.show(study, [one.trial for one in running.values()])
            if not running:
                return

            ready = multiprocessing.connection.wait(
                [one.receiver for one in running.values()], timeout=1.0
            )
            for slot in [slot for slot, one in running.items() if one.receiver in ready]:
                row = running.pop(slot).row(devices[slot])
                study.take(row)
                board.finished(study, row)
    finally:
        for one in running.values():
            one.process.kill()
            one.process.join()


def _started(context: Any, job: trial.TrialJob) -> Running:
    """Starts the job's process."""
    receiver, sender = context.Pipe(duplex=False)
    held, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=trial.serve, args=(job, sender, held), daemon=True)
    process.start()
    for end in (sender, held):
        end.close()  # then the child holds the only other end, and its death closes the pipe
    return Running(job.trial, process, receiver, lifeline)
