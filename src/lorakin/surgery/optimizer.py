"""What an adapter tells an optimizer: its parameter groups, by role; and what it will not let one do to it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import Role
from lorakin.surgery.graft import Graft


def parameter_groups(graft: Graft, lr: float, **options: Any) -> list[dict[str, Any]]:
    """The adapter's trainable tensors as optimizer groups, each tensor in exactly one.

    Args:
        graft: the adapter.
        lr: the base learning rate, to which the method relates that of each tensor.
        options: other options of the optimizer, put into every group; decay is 0 where the method says that none may act.

    Raises:
        SettingError: the adapter has nothing to train (it was loaded with trainable=False).
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, rate, role in _rates(graft, lr):
        groups.setdefault((rate, role.decays), []).append(parameter)
    if not groups:
        raise SettingError(f"adapter {graft.name!r} has nothing to train; load it with trainable=True")
    return [
        {"params": parameters, "lr": rate, **options, **({} if decays else {"weight_decay": 0.0})}
        for (rate, decays), parameters in groups.items()
    ]


def regroup(graft: Graft, optimizer: torch.optim.Optimizer, lr: float, **options: Any) -> None:
    """Move the adapter's tensors out of the groups of an optimizer that has not stepped yet into those of its method."""
    ours = {id(p) for _, p in graft.trained()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ours]
    for group in parameter_groups(graft, lr, **options):
        optimizer.add_param_group(group)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def check_attached(graft: Graft, optimizer: torch.optim.Optimizer) -> None:
    """Raise `SettingError` unless `optimizer` holds every trainable tensor of the adapter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in graft.trained() if id(p) not in held]
    if missing:
        raise SettingError(
            f"the optimizer holds none of {len(missing)} trainable tensors of adapter {graft.name!r} "
            f"({missing[0]}, …); build it from adapter.parameter_groups(lr=…)"
        )


def check_groups(graft: Graft, optimizer: torch.optim.Optimizer) -> None:
    """See that the optimizer's groups leave the method what it is.

    Raises:
        StateError: rates that the method relates to each other are not so related.

    Warns of decay on a tensor that must not decay.
    """
    method = graft.plan.method
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    base: dict[float, float] = {}
    decayed: set[float] = set()
    for (parameter, rate, role), (_, double, _) in zip(_rates(graft, 1.0), _rates(graft, 2.0), strict=True):
        group = group_of.get(id(parameter))
        if group is None:
            continue
        if not role.decays:
            decayed.add(float(group.get("weight_decay") or 0))
        if double == 2 * rate:  # not a rate of its own, whatever the base's
            base.setdefault(rate, float(group.get("initial_lr", group["lr"])) / rate)
    if any(decayed):
        warnings.warn(
            f"the optimizer decays tensors of adapter {graft.name!r}, such as a magnitude, that {method.words} must not decay "
            f"(weight_decay={max(decayed)}); build it from adapter.parameter_groups(lr=…, weight_decay=…)",
            LorakinWarning,
            stacklevel=2,
        )
    rates = list(base.values())
    if any(abs(rate - rates[0]) > 1e-6 * abs(rates[0]) for rate in rates):
        raise StateError(
            f"adapter {graft.name!r} is {method.words}, whose tensors learn at different rates, but the optimizer does not "
            "have them: build it with adapter.optimizer(…) or from adapter.parameter_groups(lr=…), or let "
            "lorakin.training.prepare_trainer(trainer) do so"
        )
    if len(rates) > 1 and "d0" in optimizer.defaults:  # Prodigy and D-Adaptation, which set one rate for all groups
        raise StateError(
            f"{type(optimizer).__name__} finds one learning rate for all groups, which would undo {method.words}; use another "
            "optimizer, or leave that member out"
        )


def _rates(graft: Graft, lr: float) -> list[tuple[nn.Parameter, float, Role]]:
    """Every trainable tensor once, with its rate and role. Modules trained whole have the base rate."""
    found: dict[int, tuple[nn.Parameter, float, Role]] = {}
    for path in graft.plan.sites:
        site = graft.site(path)
        roles = site.roles()
        for slot, parameter in site.tensors().items():
            if parameter.requires_grad:
                rate = graft.plan.method.rate(lr, roles[slot], site.shape)
                found.setdefault(id(parameter), (parameter, rate, roles[slot]))
    for _, parameter in graft.trained():
        found.setdefault(id(parameter), (parameter, lr, Role()))
    return list(found.values())
