"""The processes of a comparison: a trial at a time on each device, each of which ends when this process does."""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.connection
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lorakin.compare import trial
from lorakin.compare.comparison import Study
from lorakin.compare.progress import Board
from lorakin.compare.results import FAILED, ResultRow, Trial
from lorakin.errors import SettingError
from lorakin.family.settings import require


def devices_of(text: str) -> list[str]:
    """`auto`, or devices with a comma between, each as often as it is to run a trial at once: `cuda:0,cuda:1`, `cpu,cpu`.

    Raises:
        SettingError: a device that is not there.
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
                f"--devices {text!r}: there is no {device!r} here; there are: {', '.join(('cpu', *cards))}"
            )
    require(
        bool(found), f"--devices {text!r} names none; expected such as cuda:0,cuda:1 or cpu,cpu"
    )
    return found


@dataclasses.dataclass
class Running:
    """A trial's process, which ends when its `lifeline` does: with this process, however that ends."""

    trial: Trial
    process: Any
    receiver: multiprocessing.connection.Connection
    lifeline: multiprocessing.connection.Connection

    def row(self, device: str) -> ResultRow:
        """What it sent, or, of one that died, what it died of."""
        try:
            row: ResultRow = self.receiver.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            why = ", killed, perhaps for lack of memory" if code == -9 else ""
            row = ResultRow(
                self.trial,
                FAILED,
                f"its process ended with exit code {code}{why}; its log may tell more",
                device=device,
            )
        self.process.join()
        self.lifeline.close()
        return row


def run(study: Study, devices: Sequence[str], board: Board) -> None:
    """Run what remains, a trial at a time on each device, and note each row as it comes."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([trial.__name__])
    threads = max(1, torch.get_num_threads() // max(1, list(devices).count("cpu")))
    running: dict[int, Running] = {}
    try:
        while True:
            busy = [one.trial for one in running.values()]
            waiting = [what for what in study.remaining() if what not in busy]
            for slot in [slot for slot in range(len(devices)) if slot not in running][
                : len(waiting)
            ]:
                what = waiting.pop(0)
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
    receiver, sender = context.Pipe(duplex=False)
    held, lifeline = context.Pipe(duplex=False)
    process = context.Process(target=trial.serve, args=(job, sender, held), daemon=True)
    process.start()
    for end in (sender, held):
        end.close()  # so that the end of a process is the end of its pipe
    return Running(job.trial, process, receiver, lifeline)
