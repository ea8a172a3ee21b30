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

MOMENTS = 4
"""How often the weights of a run are measured, at equal distances; the last time at its end."""


class Observer(transformers.TrainerCallback):
    """A Trainer callback that times each step and measures the weights a few times.

    Attributes:
        seconds: of each step, by the clock.
        work: seconds of each step on the processor; on a GPU the same as `seconds`.
        moves: (step, path → (ΔM, ΔD)) at each moment.
        ranks: (step, path → rank) whenever a rank changed.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.seconds: list[float] = []
        self.work: list[float] = []
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
        self.work.append(self.seconds[-1] if on_gpu else time.process_time() - processor)

        now = ranks(self.adapter)
        if now and (not self.ranks or self.ranks[-1][1] != now):
            self.ranks.append((state.global_step, now))

        every = max(1, state.max_steps // MOMENTS)
        if state.global_step % every == 0 and state.max_steps - state.global_step >= every:
            self.moves.append((state.global_step, moved(self.adapter)))

    @property
    def step(self) -> dict[str, float]:
        """Median seconds of a step, with the optimizer; without the first step, which warms up."""
        seconds, work = (
            statistics.median(times[1:] or times or [0.0]) for times in (self.seconds, self.work)
        )
        return {"step_seconds": seconds, "step_work": work}


@torch.no_grad()
def weights(adapter: Adapter, path: str) -> tuple[Tensor, Tensor] | None:
    """Returns the weight of the module at `path` without and with the adapter.

    Both are float32 (outputs, inputs). None: the module has no matrix.
    """
    if path in adapter.placement.whole_modules:
        twin = adapter.tensors.copy_of(path)
        if kind_of(twin) is None:
            return None
        return adapter.tensors.base_weight(path).float(), base_weight_of(twin).float()
    before, pair = adapter.tensors.base_weight(path).float(), adapter.tensors.change_at(path)
    after = before + pair.up.float() @ pair.down.float()
    return before, after if pair.gain is None else pair.gain.float().unsqueeze(1) * after


@torch.no_grad()
def moved(adapter: Adapter) -> dict[str, tuple[float, float]]:
    """Returns path → (ΔM, ΔD) for each module that the adapter changes."""
    found = {}
    for path in (*adapter.placement.methods, *adapter.placement.whole_modules):
        if (both := weights(adapter, path)) is not None:
            before, after = both
            sizes, lengths = before.norm(dim=1), after.norm(dim=1)
            cosine = (before * after).sum(1) / (sizes * lengths).clamp(min=1e-30)
            found[path] = (float((lengths - sizes).abs().mean()), float((1 - cosine).mean()))
    return found


@torch.no_grad()
def layers(adapter: Adapter) -> dict[str, dict[str, float]]:
    """Returns path → `norm`, `relative` and `rank` of the change of each module's weight.

    `norm` is ‖ΔW‖ (Frobenius), `relative` is ‖ΔW‖ / ‖W0‖. A module that is trained whole has no
    `rank`.
    """
    found = {}
    for path in (*adapter.placement.methods, *adapter.placement.whole_modules):
        if (both := weights(adapter, path)) is not None:
            change, size = float((both[1] - both[0]).norm()), float(both[0].norm())
            found[path] = {"norm": change, "relative": change / size if size else 0.0}
            if path in adapter.placement.methods:
                found[path]["rank"] = adapter.tensors.pair_at(path).down.shape[0]
    return found


def ranks(adapter: Adapter) -> dict[str, int]:
    """Returns path → ranks in use, for a method that re-allocates ranks.

    Empty for other methods, and before the first step, when all ranks are still zero.
    """
    method = adapter.placement.method
    slot = rank_switch(method.parametrisation.slots)
    if slot is None or not any("budget" in member.decides for member in method.members):
        return {}
    used = {
        path: int(torch.count_nonzero(adapter.tensors.at(path)[slot]))
        for path in adapter.placement.methods
    }
    return used if any(used.values()) else {}
