"""Shows that something takes long: a bar on the terminal, once it has taken two seconds.

What is quick shows nothing, and nothing is shown in a file or a pipe, or to who uses lorakin from
Python: the command line says where bars go (`show_on`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

PATIENCE = 2.0
"""Seconds after which a bar appears."""
T = TypeVar("T")


class Bars:
    """The bars of one console, below each other; they vanish when their work is done."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            DoneCount(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # stdout may be a file, and the bar stands on stderr
            redirect_stderr=False,
        )
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def bar(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Shows a bar if the block takes long; yields what moves it on."""
        task = self.progress.add_task(what, total=total, visible=False)
        timer = threading.Timer(PATIENCE, self._show, [task])
        timer.daemon = True
        timer.start()
        try:
            yield lambda count: self.progress.advance(task, count)
        finally:
            timer.cancel()
            with self.lock:
                self.progress.remove_task(task)
                if not any(task.visible for task in self.progress.tasks):
                    self.progress.stop()

    def _show(self, task: int) -> None:
        with self.lock:
            if task in self.progress.task_ids:
                self.progress.update(task, visible=True)  # type: ignore[arg-type]
                self.progress.start()


class DoneCount(ProgressColumn):
    """How much is done of how much, where that is known."""

    def render(self, task: Task) -> Text:
        """Returns `3/10`, or nothing."""
        return Text("") if task.total is None else MofNCompleteColumn().render(task)


_bars: list[Bars] = []


@contextlib.contextmanager
def show_on(console: Console | None) -> Iterator[None]:
    """Lets bars appear on a console while the block runs, if it is a terminal; None: nowhere."""
    before = list(_bars)
    _bars[:] = [Bars(console)] if console is not None and console.is_terminal else []
    try:
        yield
    finally:
        _bars[:] = before


@contextlib.contextmanager
def waiting(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Shows that `what` goes on, if it takes long.

    >>> with waiting("counting", total=2) as advance:
    ...     advance(1)

    Args:
        what: a few words, such as "loading smollm2".
        total: how many parts it has, if that is known.
    """
    if not _bars or threading.current_thread() is not threading.main_thread():
        yield lambda count: None
        return
    with _bars[0].bar(what, total) as advance:
        yield advance


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yields the items, and shows how many are done, if it takes long.

    >>> list(tracked([1, 2], "counting"))
    [1, 2]

    Args:
        items: what is gone through.
        what: a few words, such as "tokenising".
        total: how many there are, if `items` does not say it.
    """
    if total is None and isinstance(items, Collection):
        total = len(items)
    with waiting(what, total) as advance:
        for item in items:
            yield item
            advance(1)
