"""What is seen of a comparison while it runs: trials done, the best so far, the time that is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lorakin.compare import schedule
from lorakin.compare.results import DONE, TIMING, ResultRow, Trial
from lorakin.terminal import visible

if TYPE_CHECKING:
    from lorakin.compare.comparison import Study


class Board:
    """A live bar on a terminal, a line for each trial everywhere."""

    def __init__(self, console: Console, workers: int) -> None:
        self.console = console
        self.workers = workers
        self.bar = Progress(
            TextColumn("[bold]{task.completed}/{task.total} trials"), BarColumn(bar_width=20),
            TextColumn("{task.fields[now]}", markup=False), TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task("compare", total=1, now="")

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, study: Study, running: Sequence[Trial]) -> None:
        """The whole as it is now."""
        done, left = len(study.results.rows), study.expected()
        text = f"{best_so_far(study)}  {time_left(study, left, self.workers)} left"
        self.bar.update(
            self.task,
            completed=done,
            total=done + left,
            now=f"{text}  now: {', '.join(t.name for t in running)}",
        )

    def finished(self, study: Study, row: ResultRow) -> None:
        """A trial has ended."""
        done, left = len(study.results.rows), study.expected()
        figures = (
            f"{row.step_seconds:.3g} s a step" if row.trial.stage == TIMING else _figures(row.tune)
        )
        said = figures if row.status == DONE else f"{row.status}: {row.reason}"
        tail = (
            ""
            if self.console.is_terminal
            else f"  {best_so_far(study)}, {time_left(study, left, self.workers)} left"
        )
        self.console.print(
            visible(f"[{done}/{done + left}] {row.trial.name}  {said}{tail}"),
            highlight=False,
            markup=False,
        )


def best_so_far(study: Study) -> str:
    """The arm whose best rate has the lowest loss on the tuning rows until now."""
    best = {
        arm.title: losses[rate]
        for arm in study.arms
        if (rate := schedule.best_rate(losses := schedule.swept(arm.name, study.results.rows)))
        is not None
    }
    title = min(best, key=lambda name: best[name], default=None)
    return "" if title is None else f"best so far {title} {best[title]:.4f}"


def time_left(study: Study, trials: int, workers: int) -> str:
    """By the mean time of the trials so far."""
    times = [row.seconds for row in study.results.rows if row.status == DONE and row.seconds]
    if not times:
        return "?"
    seconds = trials * sum(times) / len(times) / max(1, workers)
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{math.ceil(seconds / 60)} min"


def _figures(tune: dict[str, float] | None) -> str:
    return "" if tune is None else f"tuning loss {tune['loss']:.4f}"
