"""The parameter groups that an adapter gives an optimizer, and checks of other optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import Slot
from lorakin.family.sharding import whole_shape
from lorakin.inject.adapted import module_at
from lorakin.inject.attachments import base_parameters

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
"""torch's normalisations. The classes of models' normalisations have "norm" in their names."""


class TrainedTensor(NamedTuple):
    """A trainable tensor of an adapter with its learning rate and slot."""

    parameter: nn.Parameter
    rate: float
    slot: Slot


def parameter_groups(adapter: InsertedAdapter, lr: float, **options: Any) -> list[dict[str, Any]]:
    """Returns the adapter's trainable tensors as optimizer groups, each tensor in exactly one.

    Args:
        adapter: the adapter.
        lr: the base learning rate; the method says how each tensor's rate relates to it.
        options: other options of the optimizer, for every group. `weight_decay` becomes 0 for
            tensors that must not decay: where the method says so, and in modules trained whole for
            biases and the weights of normalisations.

    Raises:
        SettingError: the adapter has nothing to train (it was loaded with trainable=False), or `lr`
            is not a rate.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, [lk.LoRA(rank=1), lk.LoRAPlus(ratio=16)])
    >>> [group["lr"] for group in adapter.parameter_groups(lr=1.0)]
    [1.0, 16.0]
    """
    is_number = isinstance(lr, float | int | torch.Tensor) and not isinstance(lr, bool)
    if not is_number or not 0 <= float(lr) < float("inf"):
        raise SettingError(f"lr must be a number ≥ 0, not {lr!r}")
    tensors = _trained_tensors(adapter, lr, exempt=bool(options.get("weight_decay", True)))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, rate, slot in tensors:
        groups.setdefault((rate, slot.decays), []).append(parameter)
    if not any(parameter.requires_grad for parameter, _, _ in tensors):
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
    """Moves the adapter's tensors into groups of its method, before the optimizer steps."""
    of_adapter = {id(p) for _, p in adapter.tensors.trained()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in of_adapter]
    for group in parameter_groups(adapter, lr, **options):
        optimizer.add_param_group(group)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def check_attached(adapter: InsertedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """Checks that `optimizer` holds every trainable tensor of the adapter.

    Raises:
        SettingError: it lacks one.
    """
    groups = group_of(optimizer)
    missing = [name for name, p in adapter.tensors.trained() if id(p) not in groups]
    if missing:
        raise SettingError(
            f"the optimizer holds none of {len(missing)} trainable tensors of adapter "
            f"{adapter.name!r} ({missing[0]}, …); one optimizer has to hold them all: build it "
            "from adapter.parameter_groups(lr=…)"
        )


def check_base_not_trained(adapter: InsertedAdapter, optimized: Container[int]) -> None:
    """Checks that an optimizer does not train the base under a frozen adapter.

    Args:
        adapter: the adapter.
        optimized: the ids of the optimizer's tensors.

    Raises:
        StateError: it does, and the adapter, which is in use, was loaded and trains nothing itself.
    """
    was_loaded_frozen = not (adapter.is_fresh or any(True for _ in adapter.tensors.trained()))
    if not was_loaded_frozen or not adapter.effect.is_active or adapter.effect.is_off:
        return
    weights = (
        (path, module_at(adapter.model, path)._parameters.get("weight"))
        for path in adapter.placement.methods
    )
    for path, weight in weights:
        if weight is not None and weight.requires_grad and id(weight) in optimized:
            raise StateError(
                f"the optimizer trains the base weight of {path}, but not adapter "
                f"{adapter.name!r}, which was loaded frozen and changes that weight. To train the "
                "adapter, load it with trainable=True, which freezes the base. To train the base, "
                "first make the adapter a part of it with adapter.merge(permanent=True), or take "
                "it out with adapter.remove()"
            )


def check_groups(adapter: InsertedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """Checks that the optimizer trains the adapter as its method says.

    Warns of decay on a tensor that must not decay, and of base weights that train beside the
    adapter.

    Raises:
        SettingError: it holds only a part of an adapter that needs one optimizer for all, or it
            evaluates the model within its step.
        StateError: it trains what the method keeps frozen, or finds one rate for tensors that must
            have several.
    """
    method, groups = adapter.placement.method, group_of(optimizer)
    has_several_rates = len(_rate_factors(adapter)) > 1
    acts_at_steps = any(member.acts_at_steps for member in method.members)
    if has_several_rates or acts_at_steps:
        check_attached(adapter, optimizer)
    if acts_at_steps and isinstance(optimizer, torch.optim.LBFGS):
        raise SettingError(
            f"LBFGS evaluates the model several times within a step, which {method.words} cannot "
            "follow; use another"
        )
    # Prodigy and D-Adaptation have `d0`.
    if has_several_rates and "d0" in optimizer.defaults:
        raise StateError(
            f"{type(optimizer).__name__} finds one learning rate for all groups, which would undo "
            f"{method.words}; use another optimizer, or leave that member out"
        )
    for path in adapter.placement.methods:
        branch = adapter.tensors.branch(path)
        for name, slot in branch.slots().items():
            parameter = branch.tensors().get(name)
            if slot.trained or parameter is None or not parameter.requires_grad:
                continue
            if id(parameter) in groups:
                raise StateError(
                    f"the optimizer trains {path}.{name}, which {method.words} keeps as it is: "
                    "something set its requires_grad. Set it back, and build the optimizer from "
                    "adapter.parameter_groups(lr=…)"
                )
    _warn_of_side_effects(adapter, groups)


def _warn_of_side_effects(adapter: InsertedAdapter, groups: dict[int, dict[str, Any]]) -> None:
    """Warns of decay on tensors that must not decay, and of base weights that train too."""
    words = adapter.placement.method.words
    decayed = {
        float(groups[id(p)].get("weight_decay") or 0)
        for p, _, slot in _trained_tensors(adapter, 1.0, exempt=False)
        if id(p) in groups and not slot.decays
    }
    if any(decayed):
        warnings.warn(
            f"the optimizer decays tensors of adapter {adapter.name!r}, such as a magnitude, that "
            f"{words} must not decay (weight_decay={max(decayed)}); build it from "
            "adapter.parameter_groups(lr=…, weight_decay=…)",
            LorakinWarning,
            stacklevel=2,
        )
    parameters = base_parameters(adapter.model)
    base = [name for name, p in parameters if p.requires_grad and id(p) in groups]
    if base:
        warnings.warn(
            f"the optimizer also trains {len(base)} tensors of the base model ({base[0]}, …), "
            f"which adapter {adapter.name!r} does not hold and its files will not either; name "
            "them in modules_to_save, or build the optimizer from adapter.parameter_groups(lr=…)",
            LorakinWarning,
            stacklevel=2,
        )


def check_rates(adapter: InsertedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """Checks that the rates in use are related as the method says.

    At a later step than the first it only warns, once.

    Raises:
        StateError: they are not, at the first step.
    """
    factors = adapter.run.rate_factors = adapter.run.rate_factors or _rate_factors(adapter)
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
            f"adapter {adapter.name!r} is {words}, whose tensors learn at different rates, but the "
            "optimizer does not have them: build it with adapter.optimizer(…) or from "
            "adapter.parameter_groups(lr=…), or let lorakin.training.prepare_trainer(trainer) do "
            "so. A schedule has to multiply all groups' rates alike, which OneCycleLR does not"
        )
    if not adapter.run.warned_of_rates:
        adapter.run.warned_of_rates = True
        warnings.warn(
            f"at step {adapter.run.steps + 1} the learning rates of adapter {adapter.name!r} are "
            f"no longer related as {words} says; a schedule with a least or a greatest rate does "
            "that, as does setting group['lr'] by hand",
            LorakinWarning,
            stacklevel=2,
        )


def group_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Returns the group of each tensor that the optimizer holds, by the tensor's id.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> group_of(torch.optim.SGD([weight], lr=0.5))[id(weight)]["lr"]
    0.5
    """
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _rate_factors(adapter: InsertedAdapter) -> dict[float, int]:
    """Returns the factors on the base rate that tensors have, each with the id of one such tensor.

    Rates that do not depend on the base rate are left out.
    """
    factors: dict[float, int] = {}
    at_one, at_two = _trained_tensors(adapter, 1.0), _trained_tensors(adapter, 2.0)
    for tensor, same_tensor in zip(at_one, at_two, strict=True):
        # A fixed `lr` does not double.
        if same_tensor.rate == 2 * tensor.rate:
            factors.setdefault(tensor.rate, id(tensor.parameter))
    return factors


def may_decay(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Returns whether weight decay may act on a parameter of `owner` with this full name.

    It must not act on biases and normalisations. transformers' Trainer knows normalisations other
    than torch's LayerNorm by their names only, and so decays some (`norm_f`).

    >>> layer, norm = nn.Linear(2, 2), nn.LayerNorm(2)
    >>> may_decay(layer, "fc.weight", layer.weight), may_decay(layer, "fc.bias", layer.bias)
    (True, False)
    >>> may_decay(norm, "norm.weight", norm.weight)
    False
    """
    is_norm = isinstance(owner, NORMS) or (
        "norm" in type(owner).__name__.lower() and len(whole_shape(parameter)) < 2
    )
    return "bias" not in name.lower() and not is_norm


def _trained_tensors(
    adapter: InsertedAdapter, lr: float, exempt: bool = True
) -> list[TrainedTensor]:
    """Returns every trainable tensor once, with its rate and slot.

    Modules trained whole have the base rate. With `exempt`, those of their parameters that must not
    decay have a slot that says so. Without weight decay that makes no difference, and a run that
    was begun before there was one keeps its groups.

    A tensor whose ranks were all freed stays in its group, so that the optimizer of a resumed run
    has the same groups.
    """
    tensors: dict[int, TrainedTensor] = {}
    for path in adapter.placement.methods:
        branch = adapter.tensors.branch(path)
        slots = branch.slots()
        for slot, parameter in branch.tensors().items():
            if parameter.requires_grad or (slots[slot].trained and not parameter.numel()):
                rate = slots[slot].rate_at(lr)
                tensors.setdefault(id(parameter), TrainedTensor(parameter, rate, slots[slot]))
    for whole_module in adapter.placement.whole_modules:
        trained_copy = adapter.tensors.copy_of(whole_module)
        for path, owner in trained_copy.named_modules(prefix=whole_module):
            for leaf, parameter in owner.named_parameters(recurse=False):
                if parameter.requires_grad:
                    slot_of_copy = Slot(
                        (), decays=not exempt or may_decay(owner, f"{path}.{leaf}", parameter)
                    )
                    tensors.setdefault(id(parameter), TrainedTensor(parameter, lr, slot_of_copy))
    for bias in adapter.tensors.biases().values():
        if bias.requires_grad:
            tensors.setdefault(id(bias), TrainedTensor(bias, lr, Slot((), decays=False)))
    # What is left are token rows.
    for _, parameter in adapter.tensors.trained():
        tensors.setdefault(id(parameter), TrainedTensor(parameter, lr, Slot(())))
    return list(tensors.values())
