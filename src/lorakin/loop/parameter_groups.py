"""What an adapter tells an optimizer: its parameter groups, by role; and what it will not let one do to it."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import Slot
from lorakin.family.method import rate as rate_of
from lorakin.family.pair import whole_shape
from lorakin.inject.adapted import module_at

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
"""torch's normalisations. Models have others of their own, which say so in the name of their class."""


def parameter_groups(adapter: InsertedAdapter, lr: float, **options: Any) -> list[dict[str, Any]]:
    """The adapter's trainable tensors as optimizer groups, each tensor in exactly one.

    Args:
        adapter: the adapter.
        lr: the base learning rate, to which the method relates that of each tensor.
        options: other options of the optimizer, put into every group. `weight_decay` is 0 where the method says that none
            may act and, in modules trained whole, on biases and the weights of normalisations.

    Raises:
        SettingError: the adapter has nothing to train (it was loaded with trainable=False), or `lr` is no rate.
    """
    if (
        not isinstance(lr, float | int | torch.Tensor)
        or isinstance(lr, bool)
        or not 0 <= float(lr) < float("inf")
    ):
        raise SettingError(f"lr must be a number ≥ 0, not {lr!r}")
    rates = (
        _rates(adapter, lr)
        if options.get("weight_decay", True)
        else _rates(adapter, lr, exempt=False)
    )
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, rate, slot in rates:
        groups.setdefault((rate, slot.decays), []).append(parameter)
    if not any(
        parameter.requires_grad for parameters in groups.values() for parameter in parameters
    ):
        raise SettingError(
            f"adapter {adapter.name!r} has nothing to train; load it with trainable=True"
        )
    return [
        {"params": parameters, "lr": rate, **options, **({} if decays else {"weight_decay": 0.0})}
        for (rate, decays), parameters in groups.items()
    ]


def regroup(
    adapter: InsertedAdapter, optimizer: torch.optim.Optimizer, lr: float, **options: Any
) -> None:
    """Move the adapter's tensors out of the groups of an optimizer that has not stepped yet into those of its method."""
    ours = {id(p) for _, p in adapter.tensors.trained()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ours]
    for group in parameter_groups(adapter, lr, **options):
        optimizer.add_param_group(group)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def check_attached(adapter: InsertedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """Raise `SettingError` unless `optimizer` holds every trainable tensor of the adapter."""
    held = group_of(optimizer)
    missing = [name for name, p in adapter.tensors.trained() if id(p) not in held]
    if missing:
        raise SettingError(
            f"the optimizer holds none of {len(missing)} trainable tensors of adapter {adapter.name!r} "
            f"({missing[0]}, …); one optimizer has to hold them all: build it from adapter.parameter_groups(lr=…)"
        )


def check_base_is_still(adapter: InsertedAdapter, held: Container[int]) -> None:
    """See that an optimizer, which holds the tensors of these ids, does not train the base under a frozen adapter.

    Raises:
        StateError: it does, and the adapter, which is in use, was loaded and trains nothing itself.
    """
    frozen = not (adapter.is_fresh or any(True for _ in adapter.tensors.trained()))
    if not frozen or not adapter.merging.is_active or adapter.merging.is_off:
        return
    weights = (
        (path, module_at(adapter.model, path)._parameters.get("weight"))
        for path in adapter.placement.methods
    )
    for path, weight in weights:
        if weight is not None and weight.requires_grad and id(weight) in held:
            raise StateError(
                f"the optimizer trains the base weight of {path}, but not adapter {adapter.name!r}, which was "
                "loaded frozen and changes that weight. To train the adapter, load it with trainable=True, which "
                "freezes the base. To train the base, first make the adapter a part of it with "
                "adapter.merge(permanent=True), or take it out with adapter.remove()"
            )


def check_groups(adapter: InsertedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """See that the optimizer leaves the method what it is.

    Raises:
        SettingError: it holds a part of an adapter that needs the whole in one, or it evaluates the model within its step.
        StateError: it trains what the method keeps frozen, or finds one rate for tensors that are to have several.

    Warns of decay on a tensor that must not decay, and of base weights that train beside the adapter.
    """
    method, groups = adapter.placement.method, group_of(optimizer)
    related = len(_factors(adapter)) > 1
    acting = any(member.acts_at_steps for member in method.members)
    if related or acting:
        check_attached(adapter, optimizer)
    if acting and isinstance(optimizer, torch.optim.LBFGS):
        raise SettingError(
            f"LBFGS evaluates the model several times within a step, which {method.words} cannot follow; use another"
        )
    if related and "d0" in optimizer.defaults:  # Prodigy and D-Adaptation
        raise StateError(
            f"{type(optimizer).__name__} finds one learning rate for all groups, which would undo {method.words}; use another "
            "optimizer, or leave that member out"
        )
    for path in adapter.placement.methods:
        branch = adapter.tensors.branch(path)
        for name, slot in branch.slots().items():
            parameter = branch.tensors().get(name)
            if (
                parameter is not None
                and parameter.requires_grad
                and not slot.trained
                and id(parameter) in groups
            ):
                raise StateError(
                    f"the optimizer trains {path}.{name}, which {method.words} keeps as it is: something set its "
                    "requires_grad. Set it back, and build the optimizer from adapter.parameter_groups(lr=…)"
                )
    _warn_of_side_effects(adapter, groups)


def _warn_of_side_effects(adapter: InsertedAdapter, groups: dict[int, dict[str, Any]]) -> None:
    """Warn of decay on tensors that must not decay, and of base weights that train beside the adapter."""
    words = adapter.placement.method.words
    decayed = {
        float(groups[id(p)].get("weight_decay") or 0)
        for p, _, slot in _rates(adapter, 1.0, exempt=False)
        if id(p) in groups and not slot.decays
    }
    if any(decayed):
        warnings.warn(
            f"the optimizer decays tensors of adapter {adapter.name!r}, such as a magnitude, that {words} must not decay "
            f"(weight_decay={max(decayed)}); build it from adapter.parameter_groups(lr=…, weight_decay=…)",
            LorakinWarning,
            stacklevel=2,
        )
    base = [name for name, p in adapter.base_parameters() if p.requires_grad and id(p) in groups]
    if base:
        warnings.warn(
            f"the optimizer also trains {len(base)} tensors of the base model ({base[0]}, …), which adapter {adapter.name!r} "
            "does not hold and its files will not either; name them in modules_to_save, or build the optimizer from "
            "adapter.parameter_groups(lr=…)",
            LorakinWarning,
            stacklevel=2,
        )


def check_rates(adapter: InsertedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """See that the rates in use are related as the method says: an error at the first step, later, once, a warning.

    Raises:
        StateError: they are not.
    """
    factors = adapter.run.rate_factors = adapter.run.rate_factors or _factors(adapter)
    if len(factors) < 2:
        return
    groups = group_of(optimizer)
    bases = [
        float(groups[number]["lr"]) / factor
        for factor, number in factors.items()
        if number in groups
    ]
    if all(abs(base - bases[0]) <= 1e-6 * abs(bases[0]) for base in bases):
        return
    words = adapter.placement.method.words
    if not adapter.run.steps:
        raise StateError(
            f"adapter {adapter.name!r} is {words}, whose tensors learn at different rates, but the optimizer does not "
            "have them: build it with adapter.optimizer(…) or from adapter.parameter_groups(lr=…), or let "
            "lorakin.training.prepare_trainer(trainer) do so. A schedule has to multiply all groups' rates alike, "
            "which OneCycleLR does not"
        )
    if not adapter.run.warned_of_rates:
        adapter.run.warned_of_rates = True
        warnings.warn(
            f"at step {adapter.run.steps + 1} the learning rates of adapter {adapter.name!r} are no longer related as {words} says; a "
            "schedule with a least or a greatest rate does that, as does setting group['lr'] by hand",
            LorakinWarning,
            stacklevel=2,
        )


def group_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """The group of each tensor that the optimizer holds, by the tensor's id."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _factors(adapter: InsertedAdapter) -> dict[float, int]:
    """How many times the base rate the tensors have, each with (the id of) one tensor that has it; absolute rates left out."""
    factors: dict[float, int] = {}
    for (parameter, rate, _), (_, double, _) in zip(
        _rates(adapter, 1.0), _rates(adapter, 2.0), strict=True
    ):
        if double == 2 * rate:
            factors.setdefault(rate, id(parameter))
    return factors


def decays(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is to act on a parameter of `owner` with this full name: no bias, and not of a normalisation.

    transformers' Trainer goes by names alone where a normalisation is not torch's LayerNorm, and so decays some (`norm_f`).
    """
    own_norm = "norm" in type(owner).__name__.lower() and len(whole_shape(parameter)) < 2
    return "bias" not in name.lower() and not own_norm and not isinstance(owner, NORMS)


def _rates(
    adapter: InsertedAdapter, lr: float, exempt: bool = True
) -> list[tuple[nn.Parameter, float, Slot]]:
    """Every trainable tensor once, with its rate and role. Modules trained whole have the base rate.

    With `exempt`, those of their parameters that `decays` exempts have a role that does not decay. Without decay there is no
    difference, and a run begun before there was one keeps its groups.

    One whose ranks were all freed stays in its group, so that the optimizer of a resumed run has the groups of the first.
    """
    found: dict[int, tuple[nn.Parameter, float, Slot]] = {}
    for path in adapter.placement.methods:
        branch = adapter.tensors.branch(path)
        slots = branch.slots()
        for slot, parameter in branch.tensors().items():
            if parameter.requires_grad or (slots[slot].trained and not parameter.numel()):
                rate = rate_of(lr, slots[slot])
                found.setdefault(id(parameter), (parameter, rate, slots[slot]))
    for at in adapter.placement.copies:
        for path, owner in adapter.tensors.copy_of(at).named_modules(prefix=at):
            for leaf, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad:
                    acts = not exempt or decays(owner, f"{path}.{leaf}", parameter)
                    found.setdefault(id(parameter), (parameter, lr, Slot((), decays=acts)))
    for bias in adapter.tensors.biases().values():
        if bias.requires_grad:
            found.setdefault(id(bias), (bias, lr, Slot((), decays=False)))
    for _, parameter in adapter.tensors.trained():  # rows of tokens
        found.setdefault(id(parameter), (parameter, lr, Slot(())))
    return list(found.values())
