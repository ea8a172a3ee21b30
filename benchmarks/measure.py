"""Clocks, bytes and ratios. Times are compared only if they were taken in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Spread(NamedTuple):
    """Median, lowest and highest of some figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """Returns the spread of figures in any order.

        >>> print(Spread.of([1.2, 1.0, 1.5]))
        1.20 (1.00–1.50)
        """
        return cls(statistics.median(figures), min(figures), max(figures))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, dict[str, list[float]]]:
    """Runs all calls in turns; returns clock → call → seconds of each round.

    The clocks are `thread`, this thread's own, and `wall`; on a GPU only `wall` is meaningful. The
    first round warms up and is left out. Every other round runs in reverse order, so that a drift
    of the machine hits all calls alike.
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
    """Returns the spread of one call's time over another's, taken round by round."""
    return Spread.of(
        [one / other for one, other in zip(seconds[over], seconds[under], strict=True)]
    )


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Returns the bytes that autograd keeps for the backward: storages, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor.detach()  # an output itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())
