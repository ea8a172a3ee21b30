"""What a user sees of a run while it lasts: a bar or lines, and `metrics.jsonl`."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import psutil
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorakin.errors import DataError
from lorakin.storage import atomic, files
from lorakin.storage.schema import Check, Count, SchemaError, checked
from lorakin.waiting import show_on

MOST_BYTES = 1 << 28
"""The longest file that is read; a million steps take some hundred million bytes."""
KINDS: dict[str, Any] = {
    "step": Count,
    "rows": str | int,
    "eval_count": Annotated[float, Check("a count", lambda count: 0 <= count < 1e15)],
}
"""Names in a row whose values are not plain numbers."""


NOT_DRAWN = ("eval_loss", "eval_count", "eval_perplexity")
"""Held-out figures that have no curve of their own."""
NOT_SHOWN = ("eval_count", "eval_perplexity", "eval_score")
"""Held-out figures that are not in the line while a run lasts."""


def memory_bytes() -> int:
    """Returns what the process holds now: allocated memory on a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Returns the most that the process has held so far, in the same sense."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


class Metrics:
    """`metrics.jsonl`: one JSON object a line, appended as the run goes on."""

    def __init__(self, path: Path, from_step: int = 0, writes: bool = True) -> None:
        """Opens the file; rows after `from_step`, left by an interrupted run, are dropped.

        Args:
            path: the file.
            from_step: the step from which the run goes on.
            writes: whether this process writes; of several, one does.
        """
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [row for row in self.rows() if row["step"] <= from_step] if from_step else []
        atomic.write(
            path.parent, {path.name: "".join(json.dumps(row) + "\n" for row in kept).encode()}
        )

    def add(self, step: int, **values: float) -> None:
        """Appends a row."""
        if not self.writes:
            return
        with files.open_for_append(self.path) as file:
            file.write((json.dumps({"step": step, **values}) + "\n").encode())

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows so far, without a last line that a kill cut off.

        Raises:
            DataError: the file holds something else.
        """
        if not self.path.exists():
            return []
        try:
            content = files.read_limited(self.path, MOST_BYTES, DataError).decode(
                "utf-8", errors="replace"
            )
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
        whole, _, rest = content.rpartition("\n")
        lines = whole.splitlines() + ([rest] if rest.endswith("}") else [])
        return [self._row(number, line) for number, line in enumerate(lines, 1) if line]

    def _row(self, number: int, line: str) -> dict[str, Any]:
        try:
            content = checked(dict[str, Any], json.loads(line))
            row = {
                name: checked(KINDS.get(name, float), value, name)
                for name, value in content.items()
            }
            if "step" not in row:
                raise SchemaError("step is missing")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path}, line {number} is not a row of metrics: {error}; remove that line"
            ) from None
        return row

    def plot(self, path: Path) -> None:
        """Draws the training and the held-out loss over the steps, and other held-out figures."""
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        others = {name: points for name in self._others() if (points := self._points(name))[1:]}
        size = (7, 6.5 if others else 4)
        figure = plt.figure(figsize=size, layout="constrained")
        axes, *below = figure.subplots(1 + bool(others), sharex=True, squeeze=False)[:, 0]
        training, held_out = self._points("loss"), self._points("eval_loss")
        if training:
            axes.plot(
                *zip(*training, strict=True),
                color="tab:blue",
                alpha=0.35,
                linewidth=1,
                label="training, each step",
            )
            steps, losses = zip(*training, strict=True)
            axes.plot(
                steps,
                running_mean(losses),
                color="tab:blue",
                linewidth=2,
                label="training, running mean",
            )
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
        for name, points in others.items():
            label = name.removeprefix("eval_").replace("_", " ")
            below[0].plot(*zip(*points, strict=True), "o-", label=label)
        axes.set(ylabel="loss")
        for part in (axes, *below):
            part.set(xlabel="step")
            part.grid(alpha=0.3)
            part.legend()
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=120)
        plt.close(figure)
        atomic.write(path.parent, {path.name: drawn.getvalue()})

    def _others(self) -> list[str]:
        """Returns the names of held-out figures besides the loss."""
        names = dict.fromkeys(name for row in self.rows() for name in row)
        return [n for n in names if n.startswith("eval_") and n not in NOT_DRAWN]

    def _points(self, name: str) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.rows() if name in row]


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Returns an exponential running mean that is unbiased at its start.

    >>> running_mean([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]

    Args:
        values: the values.
        keep: the weight of what came before, in [0, 1).
    """
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


class Watch(transformers.TrainerCallback):
    """A Trainer callback that shows step, loss, rate, tokens per second, time left and memory."""

    def __init__(self, console: Console, metrics: Metrics) -> None:
        self.console = console
        self.metrics = metrics
        self.held_out = ""
        self.progress = Progress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_tokens = time.perf_counter(), state.num_input_tokens_seen
        self.last_line = 0.0
        self.task = self.progress.add_task(
            "train", total=state.max_steps, completed=state.global_step, figures=""
        )
        if self.console.is_terminal:
            self.progress.start()
            self.others = show_on(None)  # one bar at a time
            self.others.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        speed = (state.num_input_tokens_seen - self.first_tokens) / (
            time.perf_counter() - self.started
        )
        values = {
            key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs
        }
        memory = memory_bytes()
        self.metrics.add(
            state.global_step, **values, tokens_per_second=round(speed, 1), memory_bytes=memory
        )
        norm = f"  grad {values['grad_norm']:.2g}" if "grad_norm" in values else ""
        figures = (
            f"loss {values['loss']:.3f}  lr {values['learning_rate']:.1e}{norm}  "
            f"{speed:,.0f} tok/s  {memory / 2**30:.1f} GiB"
        )
        self.progress.update(
            self.task, completed=state.global_step, figures=figures + self.held_out
        )
        now = time.perf_counter()
        if not self.console.is_terminal and (
            now - self.last_line > 15 or state.global_step == state.max_steps
        ):
            self.last_line = now
            done = self.progress.tasks[0]
            left = "" if done.time_remaining is None else f"  left {done.time_remaining:.0f} s"
            self._print(f"step {state.global_step}/{state.max_steps}  {figures}{left}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        figures = [
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.3f}"
            for name, value in (metrics or {}).items()
            if name not in NOT_SHOWN and not name.endswith(("_low", "_high"))
        ]
        self.held_out = f"  held out {', '.join(figures)}"
        if not self.console.is_terminal:
            self._print(f"step {state.global_step}/{state.max_steps}{self.held_out}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.console.is_terminal:
            self.others.__exit__(None, None, None)
        self.progress.stop()
