"""Clocks, bytes and ratios. A time is only ever compared with one taken next to it in the same process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Spread(NamedTuple):
    """The median of some figures and how far they reach."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """Of figures in any order."""
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call in every round but a first one, by clock: `thread`, this thread's own, and `wall`.

    The order is reversed every other round, so that what drifts meets all alike. On a GPU only `wall` means anything.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in calls} for clock in ("thread", "wall")
    }
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            _finish(device)
            thread, wall = time.thread_time(), time.perf_counter()
            calls[name]()
            _finish(device)
            if number:
                seconds["thread"][name].append(time.thread_time() - thread)
                seconds["wall"][name].append(time.perf_counter() - wall)
    return seconds


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> Spread:
    """One call's time over another's, round by round."""
    return Spread.of(
        [one / other for one, other in zip(seconds[over], seconds[under], strict=True)]
    )


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """The bytes that autograd keeps of a forward for the backward: each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor.detach()  # an output itself would hold its own graph, for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())
