"""Shows a comparison while it runs: trials done, the best method so far, the time left."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lorakin.compare import next_trials
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.report_answers import words_of
from lorakin.compare.results import DONE, TIMING, ResultRow, Trial
from lorakin.terminal import visible


class Board:
    """Shows a live bar on a terminal, and prints a line for each trial everywhere."""

    def __init__(self, console: Console, workers: int) -> None:
        self.console = console
        self.workers = workers
        self.bar = Progress(
            TextColumn("[bold]{task.completed}/{task.total} trials"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[now]}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self.task = self.bar.add_task("compare", total=1, now="")

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, comparison_run: PreparedComparison, running: Sequence[Trial]) -> None:
        """Updates the bar."""
        rows, left = comparison_run.results.rows, comparison_run.expected()
        done = len(rows)
        text = f"{best_so_far(comparison_run)}  {time_left(rows, left, self.workers)} left"
        names = ", ".join(trial.name for trial in running)
        self.bar.update(self.task, completed=done, total=done + left, now=f"{text}  now: {names}")

    def finished(self, comparison_run: PreparedComparison, row: ResultRow) -> None:
        """Prints how a trial ended."""
        rows, left = comparison_run.results.rows, comparison_run.expected()
        done, tail = len(rows), ""
        if not self.console.is_terminal:
            tail = f"  {best_so_far(comparison_run)}, {time_left(rows, left, self.workers)} left"
        outcome = _outcome(row, comparison_run.measure)
        line = f"[{done}/{done + left}] {row.trial.name}  {outcome}{tail}"
        self.console.print(visible(line), highlight=False, markup=False)


def best_so_far(comparison_run: PreparedComparison) -> str:
    """Returns the arm that is best on the tuning rows so far; "" if none has finished."""
    best: dict[str, next_trials.Score] = {}
    measure, rows = comparison_run.measure, comparison_run.results.rows
    for arm in comparison_run.arms:
        scores = next_trials.sweep_scores(arm.name, rows, measure)
        if (rate := next_trials.best_rate(scores)) is not None:
            best[arm.title] = scores[rate]
    title = min(best, key=lambda name: best[name], default=None)
    return "" if title is None else f"best so far {title} {abs(best[title][0]):.4f}"


def time_left(rows: Sequence[ResultRow], trials: int, workers: int) -> str:
    """Returns about how long `trials` trials will take, by the mean time of the trials so far."""
    times = [row.seconds for row in rows if row.status == DONE and row.seconds]
    if not times:
        return "?"
    seconds = trials * sum(times) / len(times) / max(1, workers)
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{math.ceil(seconds / 60)} min"


def _outcome(row: ResultRow, measure: str) -> str:
    if row.status != DONE:
        return f"{row.status}: {row.reason}"
    if row.trial.stage == TIMING:
        return f"{row.step_seconds:.3g} s a step"
    if row.tune is None:
        return ""
    names = dict.fromkeys((measure, "loss"))
    return ", ".join(f"tuning {words_of(n)} {row.tune[n]:.4f}" for n in names if n in row.tune)
