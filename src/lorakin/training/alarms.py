"""Warnings while a run is still going: in plain words, once each, with what to try."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from rich.console import Console

from lorakin.terminal import labelled
from lorakin.training.batches import GOOD, Row, texts_of

USUAL = 20
"""Steps after which the usual norm of a gradient is known."""
EXPLODING = 10
"""A gradient so many times larger than usual is the first sign of a diverging run."""
UNTOUCHED = 5
"""After so many steps without any gradient, none will come."""
LEAST = 20
"""Steps of the shortest run whose middle says something about its loss."""


def warn(console: Console, text: str) -> None:
    """Tells the user, in the form of all of lorakin's warnings."""
    console = getattr(console, "for_warnings", console)
    console.print(labelled("warning: ", text, "bold yellow"), soft_wrap=True)


class Alarms(transformers.TrainerCallback):
    """A Trainer callback that warns, once each, of what is likely to go wrong.

    Gradients that explode, gradients that never come, and a loss that does not fall.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.norms: list[float] = []
        self.losses: list[float] = []
        self.said: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Looks at the loss and at the norm of the gradient of each step."""
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        norm = float(logs.get("grad_norm", math.nan))
        if math.isfinite(norm):
            self._see_norm(norm, state.global_step)
            self.norms.append(norm)
        if state.global_step == state.max_steps // 2 and len(self.losses) >= LEAST:
            self._see_losses(state.global_step)

    def _see_norm(self, norm: float, step: int) -> None:
        usual = statistics.median(self.norms[-USUAL:]) if len(self.norms) >= USUAL else math.nan
        if norm > EXPLODING * usual > 0:
            self._say(
                "explodes",
                f"at step {step} the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the "
                f"usual {usual:.3g}; if the loss rises from here, try a lower --lr, or a longer "
                "--warmup",
            )
        if norm == 0 and not any(self.norms[-UNTOUCHED + 1 :]) and len(self.norms) >= UNTOUCHED - 1:
            self._say(
                "nothing",
                f"the gradient has been exactly zero for {UNTOUCHED} steps (now step {step}): no "
                "training reaches the adapter. Are its --targets used by the model, and do the "
                "rows have answers?",
            )

    def _see_losses(self, step: int) -> None:
        part = max(5, len(self.losses) // 4)
        first, last = self.losses[:part], self.losses[-part:]
        noise = math.sqrt((statistics.variance(first) + statistics.variance(last)) / part)
        if statistics.mean(last) > statistics.mean(first) - noise:
            self._say(
                "flat",
                f"after {step} steps the training loss has not fallen: "
                f"{statistics.mean(first):.3f} over the first {part} steps, "
                f"{statistics.mean(last):.3f} over the last. Try a higher --lr if the loss is "
                "flat, a lower one if it rises, and look at the example above: is the green part "
                "what the model should learn?",
            )

    def _say(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            warn(self.console, text)


def repeated(train: Iterable[Row], held_out: Sequence[Row]) -> int:
    """Returns how many of the held-out examples are also trained on, token by token.

    >>> row = {"input_ids": [1, 2], "labels": [1, 2]}
    >>> repeated([row], [row, {"input_ids": [3], "labels": [3]}])
    1
    """
    seen = {row_key(example) for example in train}
    return sum(row_key(example) in seen for example in held_out)


def row_key(example: Row) -> tuple[Any, ...]:
    """Returns what two examples have in common exactly if they are the same, token by token."""
    key: list[Any] = [example.get(GOOD)]
    for text in texts_of(example):
        labels = text["labels"]
        key += [tuple(text["input_ids"]), tuple(labels) if isinstance(labels, list) else labels]
    return tuple(key)
