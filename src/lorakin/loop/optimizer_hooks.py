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
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.run import CALLBACKS, AdapterCallback
from lorakin.kernels.autograd import STEPS, is_capturing
from lorakin.loop import fsdp
from lorakin.loop.parameter_groups import (
    check_base_not_trained,
    check_groups,
    check_rates,
    group_of,
)


@dataclasses.dataclass
class SeenOptimizer:
    """What is known of one optimizer.

    Attributes:
        state: changes when the optimizer's tensors or the process's adapters change in number.
        trained: the adapters that it trains.
        stepping: those of them that the step under way is a step of.
    """

    state: tuple[int, int]
    trained: list[weakref.ref[InsertedAdapter]]
    stepping: list[weakref.ref[InsertedAdapter]] = dataclasses.field(default_factory=list)


_ADAPTERS: weakref.WeakSet[InsertedAdapter] = weakref.WeakSet()
_SEEN: weakref.WeakKeyDictionary[torch.optim.Optimizer, SeenOptimizer] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


class OptimizerSteps(AdapterCallback):
    """Lets every adapter see the steps of the optimizers that hold its tensors."""

    def made(self, adapter: InsertedAdapter) -> None:
        """Hooks into torch's optimizers when the process makes its first adapter."""
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_pre_hook(_before))
            _HOOKS.append(register_optimizer_step_post_hook(_after))
        _ADAPTERS.add(adapter)


CALLBACKS.append(OptimizerSteps())


def follow_optimizer(optimizer: torch.optim.Optimizer) -> list[InsertedAdapter]:
    """Returns the adapters that `optimizer` trains; checks new ones, and begins their runs.

    Raises:
        StateError: it would train an adapter in another way than its method says, or the base
            under an adapter that was loaded frozen.
    """
    state = (sum(len(group["params"]) for group in optimizer.param_groups), len(_ADAPTERS))
    seen = _SEEN.get(optimizer)
    if seen is None or seen.state != state:
        groups = group_of(optimizer)
        # The adapter of another model may have lost its modules; it must not stop this optimizer.
        intact = [adapter for adapter in _ADAPTERS if adapter.is_intact]
        trained = [
            adapter
            for adapter in intact
            if any(id(p) in groups for _, p in adapter.tensors.trained())
        ]
        trained_before = [] if seen is None else _alive(seen.trained)
        for adapter in intact:
            if adapter not in trained:
                check_base_not_trained(adapter, groups)
        for adapter in trained:
            if adapter not in trained_before:
                check_groups(adapter, optimizer)
                if adapter.run.rules is None:
                    adapter.run.begin()
                    fsdp.average_now(adapter)  # its gradients came before the run began
        references = [weakref.ref(adapter) for adapter in trained]
        _SEEN[optimizer] = seen = SeenOptimizer(state, references)
    return [adapter for adapter in _alive(seen.trained) if adapter.is_present]


def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    adapters = follow_optimizer(optimizer)
    _SEEN[optimizer].stepping = []
    if not adapters:
        return
    stepping = []
    if not _skips(optimizer):
        stepping = [
            adapter
            for adapter in adapters
            if any(p.grad is not None for _, p in adapter.tensors.trained())
        ]
    _SEEN[optimizer].stepping = [weakref.ref(adapter) for adapter in stepping]
    if any(adapter.run.rules for adapter in stepping):
        _unscale(optimizer)
    for adapter in stepping:
        if not is_capturing():
            check_rates(adapter, optimizer)  # reads rates, which a GPU may hold
        adapter.run.before_step()


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    STEPS.taken += 1
    seen = _SEEN.get(optimizer)
    for adapter in _alive(seen.stepping) if seen is not None else ():
        adapter.run.after_step(optimizer)


def _alive(references: list[weakref.ref[InsertedAdapter]]) -> list[InsertedAdapter]:
    return [adapter for reference in references if (adapter := reference()) is not None]


def _unscale(optimizer: torch.optim.Optimizer) -> None:
    """Divides a fused optimizer's gradients by the scale that a GradScaler has left in them."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    for device, grads in by_device.items():
        torch._foreach_div_(grads, scale.to(device, non_blocking=True))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether the step will do nothing: the GradScaler found infinite gradients.

    It adds up over devices where it found some, but torch's fused kernels skip a step for 1 alone.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None or not bool(found_inf > 0):
        return False
    optimizer.found_inf = found_inf.clamp(max=1)  # type: ignore[attr-defined]
    return True
