"""Measures what a run does to each weight: how far it moves, and where its ranks go.

Change of magnitude ΔM and of direction ΔD, as in "DoRA: Weight-Decomposed Low-Rank Adaptation",
arXiv 2402.09353, section 3.2. With w_j the row of a base weight W0 (outputs, inputs) that makes
output j, and w'_j the same row after training:

    ΔM = mean_j |‖w'_j‖ − ‖w_j‖|          ΔD = mean_j (1 − cos(w'_j, w_j))
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import transformers
from torch import Tensor

from lorakin.adapter import Adapter
from lorakin.family.slots import rank_switch
from lorakin.inject.layer_kinds import kind_of
from lorakin.inject.placement import base_weight_of

MEASUREMENTS = 4
"""How often the weights of a run are measured, at equal distances, the last time at its end."""


class Observer(transformers.TrainerCallback):
    """A Trainer callback that times each step and measures the weights a few times.

    Attributes:
        seconds: the seconds of each step, by the clock.
        cpu_seconds: the seconds of each step on the processor; on a GPU the same as `seconds`.
        moves: (step, path → (ΔM, ΔD)) at each measurement.
        ranks: (step, path → rank) whenever a rank changed.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.moves: list[tuple[int, dict[str, tuple[float, float]]]] = []
        self.ranks: list[tuple[int, dict[str, int]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        clock, processor = self.started
        self.seconds.append(time.perf_counter() - clock)
        self.cpu_seconds.append(self.seconds[-1] if on_gpu else time.process_time() - processor)

        ranks = ranks_in_use(self.adapter)
        if ranks and (not self.ranks or self.ranks[-1][1] != ranks):
            self.ranks.append((state.global_step, ranks))

        every = max(1, state.max_steps // MEASUREMENTS)
        if state.global_step % every == 0 and state.max_steps - state.global_step >= every:
            self.moves.append((state.global_step, magnitude_direction_changes(self.adapter)))

    @property
    def step_times(self) -> dict[str, float]:
        """The median seconds of a step, as fields of a `ResultRow`.

        A step includes the optimizer. The first step, which warms up, does not count.
        """
        seconds, cpu_seconds = (
            statistics.median(times[1:] or times or [0.0])
            for times in (self.seconds, self.cpu_seconds)
        )
        return {"step_seconds": seconds, "step_work": cpu_seconds}


@torch.no_grad()
def weights_before_after(adapter: Adapter, path: str) -> tuple[Tensor, Tensor] | None:
    """Returns the weight of the module at `path` without and with the adapter.

    Both are float32 (outputs, inputs). None: the module has no matrix.
    """
    if path in adapter.placement.whole_modules:
        trained_copy = adapter.tensors.copy_of(path)
        if kind_of(trained_copy) is None:
            return None
        return adapter.tensors.base_weight(path).float(), base_weight_of(trained_copy).float()
    before, pair = adapter.tensors.base_weight(path).float(), adapter.tensors.saved_change(path)
    after = before + pair.up.float() @ pair.down.float()
    return before, after if pair.gain is None else pair.gain.float().unsqueeze(1) * after


@torch.no_grad()
def magnitude_direction_changes(adapter: Adapter) -> dict[str, tuple[float, float]]:
    """Returns path → (ΔM, ΔD) for each module that the adapter changes."""
    changes = {}
    for path in (*adapter.placement.methods, *adapter.placement.whole_modules):
        if (weights := weights_before_after(adapter, path)) is not None:
            before, after = weights
            norms_before, norms_after = before.norm(dim=1), after.norm(dim=1)
            cosine = (before * after).sum(1) / (norms_before * norms_after).clamp(min=1e-30)
            magnitude = float((norms_after - norms_before).abs().mean())
            changes[path] = magnitude, float((1 - cosine).mean())
    return changes


@torch.no_grad()
def change_norms(adapter: Adapter) -> dict[str, dict[str, float]]:
    """Returns path → `norm`, `relative` and `rank` of the change of each module's weight.

    `norm` is ‖ΔW‖ (Frobenius), `relative` is ‖ΔW‖ / ‖W0‖. A module that is trained whole has no
    `rank`.
    """
    norms = {}
    for path in (*adapter.placement.methods, *adapter.placement.whole_modules):
        if (weights := weights_before_after(adapter, path)) is not None:
            before, after = weights
            change, size = float((after - before).norm()), float(before.norm())
            norms[path] = {"norm": change, "relative": change / size if size else 0.0}
            if path in adapter.placement.methods:
                norms[path]["rank"] = adapter.tensors.pair_now(path).down.shape[0]
    return norms


def ranks_in_use(adapter: Adapter) -> dict[str, int]:
    """Returns path → ranks in use, for a method that re-allocates ranks.

    Empty for other methods, and before the first step, when all ranks are still zero.
    """
    method = adapter.placement.method
    slot = rank_switch(method.parametrisation.slots)
    if slot is None or not any("budget" in member.decides for member in method.members):
        return {}
    ranks = {
        path: int(torch.count_nonzero(adapter.tensors.saved_tensors(path)[slot]))
        for path in adapter.placement.methods
    }
    return ranks if any(ranks.values()) else {}
