"""Adapters under DeepSpeed's ZeRO, which shards gradients, optimizer states and master weights.

Its optimizer steps over flat tensors, a piece on each process, which no member knows. So members
act around that optimizer's step. Before it, every process gathers the whole gradients, lets the
rules act on them, and gives the pieces back. After it, the same is done with the tensors that a
rule has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import all_finite

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


Freed = list[tuple[nn.Parameter, Tensor]]
"""Parameters that a rule has made smaller, with their smaller tensors.

ZeRO-3 still gathers them in full.
"""


def act_at_zero_steps(optimizer: Any, adapters: Sequence[InsertedAdapter]) -> Callable[[], None]:
    """Lets the adapters act at the steps of a DeepSpeed engine's optimizer with ZeRO.

    Returns:
        a function to call when training is over; it leaves the adapters as their rules made them.

    Raises:
        SettingError: a member makes tensors while training, for which ZeRO-3 has no place.
        StateError: ZeRO-3 cut an adapter's tensors, which members need whole.
    """
    for adapter in adapters:
        if cut := [
            name
            for name, p in adapter.tensors.trained()
            if hasattr(p, "ds_id") and not p.ds_persist  # type: ignore[attr-defined]
        ]:
            largest = max(p.ds_numel for _, p in adapter.tensors.trained())  # type: ignore[attr-defined]
            raise StateError(
                f"adapter {adapter.name!r} was sharded together with the base ({cut[0]}), but "
                "members need whole tensors: set "
                f"zero_optimization.stage3_param_persistence_threshold to {largest} at least; "
                "lorakin.training.prepare_trainer does it for transformers' Trainer"
            )
    step, freed = optimizer.step, Freed()

    @functools.wraps(step)
    def step_with_adapters(*args: Any, **kwargs: Any) -> Any:
        return _step(
            optimizer,
            [adapter for adapter in adapters if adapter.is_present],
            lambda: step(*args, **kwargs),
            freed,
        )

    def restore_freed() -> None:
        gather(adapters)
        for parameter, smaller in freed:
            parameter.data = smaller

    optimizer.step = step_with_adapters
    return restore_freed


@torch.no_grad()
def _step(
    optimizer: Any, adapters: Sequence[InsertedAdapter], step: Callable[[], Any], freed: Freed
) -> Any:
    acting = [adapter for adapter in adapters if adapter.run.rules]
    trained = list({id(p): p for adapter in acting for _, p in adapter.tensors.trained()}.values())
    clip, scale = optimizer.clip_grad, getattr(optimizer, "loss_scale", 1.0)

    gradients = [_whole_gradient(p) / scale for p in trained]
    if not all(map(all_finite, gradients)):
        # ZeRO skips this step.
        return step()
    gather(acting)
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)
    if trained and clip > 0:
        # Clip the task's gradient, before the rules add theirs.
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.clip_grad = 0.0
    for adapter in adapters:
        adapter.run.before_step()
    for parameter in trained:
        changed, parameter.grad = parameter.grad, None
        if changed is not None:
            _put_gradient(parameter, changed * scale)

    try:
        result = step()
    finally:
        optimizer.clip_grad = clip
    if getattr(optimizer, "overflow", False):
        return result

    gather(acting)
    before = [parameter.clone() for parameter in trained]
    for adapter in adapters:
        adapter.run.after_step(optimizer.optimizer)
    for parameter, values_before in zip(trained, before, strict=True):
        if parameter.shape != values_before.shape:
            freed.append((parameter, parameter.data))
        elif not torch.equal(parameter, values_before):
            _put_master(parameter)
    _adopt(optimizer, acting)
    return result


def _adopt(optimizer: Any, adapters: Sequence[InsertedAdapter]) -> None:
    """Registers tensors that a rule has made with ZeRO-3, which keeps them whole like others."""
    parameters: list[Any] = [p for a in adapters for _, p in a.tensors.named_parameters()]
    registered = [p for p in parameters if hasattr(p, "ds_id")]
    new = [p for p in parameters if not hasattr(p, "ds_id")]
    if not new or not registered:
        return
    registered[0].convert_to_zero_parameters(param_list=new)
    for parameter in new:
        parameter.ds_persist = True
    optimizer.persistent_parameters.extend(new)
    new[0].all_gather(param_list=new)
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        # It must record again in which order to fetch tensors.
        coordinator._invalidate_trace()


def gather(adapters: Sequence[InsertedAdapter]) -> None:
    """Gathers the adapters' tensors where ZeRO-3 has cut them; all processes must call it together.

    Between steps they are almost always whole.
    """
    cut: list[Any] = [
        p
        for adapter in adapters
        for _, p in adapter.tensors.named_parameters()
        if hasattr(p, "ds_id")
    ]
    if not_here := [p for p in cut if p.ds_status.name == "NOT_AVAILABLE"]:
        not_here[0].all_gather(param_list=not_here)


def _whole_gradient(parameter: Any) -> Tensor:
    """Returns the mean gradient over the processes, times the loss's scale."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_fp32_grad_for_param(parameter)  # type: ignore[no-any-return]
    return parameter.get_full_hp_grad()  # type: ignore[no-any-return]


def _put_gradient(parameter: Any, gradient: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        local = parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
        parameter._z3_optimizer.set_local_grad_for_param(_piece(gradient, local.numel()), parameter)
    else:
        parameter.set_full_hp_grad(gradient.float())


def _put_master(parameter: Any) -> None:
    """Writes the parameter's present values into the optimizer's master copy."""
    if hasattr(parameter, "ds_id"):
        piece = _piece(parameter.detach(), parameter.ds_tensor.numel())
        parameter._z3_optimizer.set_local_hp_param(piece.float(), parameter)
        parameter.ds_tensor.copy_(piece)
    else:
        parameter.set_full_hp_param(parameter.detach().float())


def _piece(tensor: Tensor, size: int) -> Tensor:
    """Returns this process's part of a tensor cut into parts of `size` values.

    The last part is filled up with zeros.
    """
    rank, flat = torch.distributed.get_rank(), tensor.flatten()
    flat = nn.functional.pad(
        flat, (0, max(0, size * torch.distributed.get_world_size() - flat.numel()))
    )
    return flat[rank * size : (rank + 1) * size]
