"""What a page follows on the disk: read again every few seconds, by one request for all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

SECONDS = 2.0
"""Seconds after which the directories of the runs are read again."""
Handler = Callable[..., tuple[Any, ...]]


class Ticks:
    """What is followed while a page is open.

    Gradio makes a request for each handler of a timer, which costs server and browser more than
    what the handlers do. Here all are one.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Handler, list[Any], list[Any]]] = []

    def follow(
        self,
        read: Handler,
        show: Handler,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> dict[str, Any]:
        """Follows what is read, and shows it when it has become another.

        Args:
            read: takes the values of the inputs; returns what there is, by whose `repr` changes are
                found.
            show: takes what was read, each value an argument; returns a value for each output.
            inputs, outputs: Gradio's components.

        Returns:
            the handler and its components, for other events that do the same.
        """
        seen = gr.State("")

        def handler(*values: Any) -> tuple[Any, ...]:
            *given, before = values
            found = read(*given)
            if (now := repr(found)) == before:
                return tuple(gr.skip() for _ in (*outputs, seen))
            return (*show(*found), now)

        part = (handler, [*inputs, seen], [*outputs, seen])
        self._parts.append(part)
        return dict(zip(("fn", "inputs", "outputs"), part, strict=True))

    def begin(self) -> None:
        """Starts the timer, on the page that is being built, once all that is followed is there."""
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
