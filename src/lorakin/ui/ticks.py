"""What a page follows on the disk: read again every few seconds, by one request for all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

SECONDS = 2.0
"""Seconds after which the directories of the runs are read again."""


class Ticks:
    """Handlers that are called again and again while a page is open.

    Gradio makes a request for each handler of a timer, which costs server and browser more than
    what the handlers do. Here all are one.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Callable[..., tuple[Any, ...]], list[Any], list[Any]]] = []

    def add(
        self, fn: Callable[..., tuple[Any, ...]], inputs: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """Adds a handler, which returns a value for each of its outputs, as in Gradio."""
        self._parts.append((fn, [*inputs], [*outputs]))

    def begin(self) -> None:
        """Starts the timer, on the page that is being built, once all handlers are there."""
        gr.Timer(SECONDS).tick(
            self._tick,
            [component for _, inputs, _ in self._parts for component in inputs],
            [component for _, _, outputs in self._parts for component in outputs],
            show_progress="hidden",
            trigger_mode="once",
        )

    def _tick(self, *values: Any) -> tuple[Any, ...]:
        answers: list[Any] = []
        begin = 0
        for fn, inputs, _ in self._parts:
            answers += fn(*values[begin : begin + len(inputs)])
            begin += len(inputs)
        return tuple(answers)
