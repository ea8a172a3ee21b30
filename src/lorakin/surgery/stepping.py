"""Every optimizer step in the process, seen by the adapters whose tensors it trains.

torch calls its global step hooks once for each real step of any optimizer: under any training loop, Trainer, Accelerate,
gradient accumulation and loss scaling. So a member that has something to do at each step is never forgotten, and a method
that an optimizer would silently change (one rate for all, decay on a magnitude) is noticed at its first step.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from lorakin.surgery.graft import Graft

_GRAFTS: weakref.WeakSet[Graft] = weakref.WeakSet()
_TRAINED: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, list[weakref.ref[Graft]]]] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


def watch(graft: Graft) -> None:
    """From now on, let `graft` see the steps of the optimizers that hold its tensors."""
    if not _HOOKS:
        _HOOKS.extend([register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)])
    _GRAFTS.add(graft)


def trained_by(optimizer: torch.optim.Optimizer) -> list[Graft]:
    """The adapters that `optimizer` trains. Each is checked when it is seen with this optimizer for the first time."""
    state = (sum(len(group["params"]) for group in optimizer.param_groups), len(_GRAFTS))
    if optimizer not in _TRAINED or _TRAINED[optimizer][0] != state:
        from lorakin.surgery.optimizer import check_attached, check_groups

        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        known = {ref() for ref in _TRAINED[optimizer][1]} if optimizer in _TRAINED else set()
        found = [graft for graft in _GRAFTS if graft.is_present and any(id(p) in held for _, p in graft.trained())]
        for graft in found:
            if graft not in known:
                check_groups(graft, optimizer)
                if graft.rules is None:
                    graft.begin()
                if graft.rules:
                    check_attached(graft, optimizer)
        _TRAINED[optimizer] = (state, [weakref.ref(graft) for graft in found])
    alive = (ref() for ref in _TRAINED[optimizer][1])
    return [graft for graft in alive if graft is not None and graft.is_present]


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    grafts = trained_by(optimizer)
    if grafts and any(graft.rules for graft in grafts):
        _unscale(optimizer)
        if not _skips(optimizer):
            for graft in grafts:
                graft.before_step()


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _skips(optimizer):
        for graft in trained_by(optimizer):
            graft.after_step(optimizer)


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """A GradScaler leaves the gradients of a fused optimizer scaled and tells it the scale; divide by it now."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step will do nothing, because the GradScaler found gradients that are not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)
