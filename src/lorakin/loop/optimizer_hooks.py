"""Hooks on every optimizer step in the process, for the adapters whose tensors it trains.

torch calls its global step hooks once for each real step of any optimizer: in any training loop, in
Trainer and Accelerate, with gradient accumulation and loss scaling. So a member that acts at each
step is never forgotten. And an optimizer that would silently change a method (one rate for all,
decay on a magnitude) is noticed when it steps.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lorakin.inject.placement import WATCHERS, Graft, Watcher
from lorakin.kernels.autograd import STEPS
from lorakin.loop import fsdp
from lorakin.loop.parameter_groups import check_base_is_still, check_groups, check_rates, group_of


@dataclasses.dataclass
class SeenOptimizer:
    """What is known of one optimizer.

    Attributes:
        state: changes when the optimizer's tensors or the process's adapters change in number.
        trained: the adapters that it trains.
        stepping: those of them that the step under way is a step of.
    """

    state: tuple[int, int]
    trained: list[weakref.ref[Graft]]
    stepping: list[weakref.ref[Graft]] = dataclasses.field(default_factory=list)


_GRAFTS: weakref.WeakSet[Graft] = weakref.WeakSet()
_SEEN: weakref.WeakKeyDictionary[torch.optim.Optimizer, SeenOptimizer] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


class StepsWatcher(Watcher):
    """Lets every adapter see the steps of the optimizers that hold its tensors."""

    def made(self, graft: Graft) -> None:
        """Hooks into torch's optimizers when the process makes its first adapter."""
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_pre_hook(_before))
            _HOOKS.append(register_optimizer_step_post_hook(_after))
        _GRAFTS.add(graft)


WATCHERS.append(StepsWatcher())


def trained_by(optimizer: torch.optim.Optimizer) -> list[Graft]:
    """Returns the adapters that `optimizer` trains, and checks those it has not seen with it."""
    state = (sum(len(group["params"]) for group in optimizer.param_groups), len(_GRAFTS))
    seen = _SEEN.get(optimizer)
    if seen is None or seen.state != state:
        held = group_of(optimizer)
        intact = [graft for graft in _GRAFTS if graft.is_intact]  # others' models may be broken
        found = [graft for graft in intact if any(id(p) in held for _, p in graft.trained())]
        known = [] if seen is None else _alive(seen.trained)
        for graft in intact:
            if graft not in found:
                check_base_is_still(graft, held)
        for graft in found:
            if graft not in known:
                check_groups(graft, optimizer)
                if graft.rules is None:
                    graft.begin()
                    fsdp.average_now(graft)  # its gradients came before
        _SEEN[optimizer] = seen = SeenOptimizer(state, [weakref.ref(graft) for graft in found])
    return [graft for graft in _alive(seen.trained) if graft.is_present]


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    grafts = trained_by(optimizer)
    _SEEN[optimizer].stepping = []
    if not grafts:
        return
    stepping = []
    if not _skips(optimizer):
        stepping = [g for g in grafts if any(p.grad is not None for _, p in g.trained())]
    _SEEN[optimizer].stepping = [weakref.ref(graft) for graft in stepping]
    if any(graft.rules for graft in stepping):
        _unscale(optimizer)
    for graft in stepping:
        check_rates(graft, optimizer)
        graft.before_step()


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    STEPS.taken += 1
    seen = _SEEN.get(optimizer)
    for graft in _alive(seen.stepping) if seen is not None else ():
        graft.after_step(optimizer)


def _alive(references: list[weakref.ref[Graft]]) -> list[Graft]:
    return [graft for reference in references if (graft := reference()) is not None]


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divides a fused optimizer's gradients by the scale that a GradScaler has left in them."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the step will do nothing: the GradScaler found infinite gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)
