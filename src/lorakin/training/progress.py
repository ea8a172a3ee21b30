"""What a user sees of a run while it lasts: a bar or lines."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorakin.training.metrics_file import Metrics
from lorakin.waiting import show_on

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
