"""An answer printed while it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import transformers

from lorakin.terminal import visible


def show_on_stdout(text: str) -> None:
    """Prints a piece of an answer: visible on a terminal, raw into a file or pipe."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


class Streamer(transformers.TextStreamer):
    """Prints an answer as it comes, without blanks around it and without what stops it.

    Args:
        tokenizer: decodes the answer.
        stops: texts that end it. What may be the beginning of one is held back.
        show: prints a piece of text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        show: Callable[[str], None] = show_on_stdout,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = stops
        self.show = show
        self.held = ""
        self.begun = self.ended = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints what is ready."""
        if not self.ended:
            self.held += text
            self.held = self.held if self.begun else self.held.lstrip()
            self._show_ready()
        if stream_end:
            if not self.ended:
                self.show(self.held.rstrip())
            self.show("\n")

    def _show_ready(self) -> None:
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        self.ended = bool(places)
        if self.ended:
            ready = self.held[: min(places)].rstrip()
        else:
            ready = self.held[: len(self.held) - self._begins_stop()].rstrip()
        self.show(ready)
        self.begun |= bool(ready)
        self.held = self.held[len(ready) :]

    def _begins_stop(self) -> int:
        """Returns how many letters at the end may be the beginning of a stop text."""
        longest = max(map(len, self.stops), default=0)
        ends = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in ends if any(s.startswith(self.held[-n:]) for s in self.stops)), 0)
