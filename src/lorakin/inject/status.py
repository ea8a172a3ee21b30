"""The state of a model and of the adapters in it, as one readable value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import nn

from lorakin.inject.class_swap import Swapped
from lorakin.inject.counts import (
    AllNoneOrSome,
    all_none_or_some,
    attachments_by,
    devices_of,
    parameter_counts,
    requires_grad,
    tensors_of,
)
from lorakin.inject.description import TRAINING, count, share
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.model_registry import adapters_in, root_of

Names = tuple[str, ...] | Literal["irregular"]
"""The adapters' names, or "irregular" if one is in that state on some of its modules only."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What `lorakin.status` found: print it, or read the fields."""

    base_model: str
    """The class of the model."""
    methods: Mapping[str, str]
    """Adapter → its members, such as `dora,lora+`, in the order in which the adapters came."""
    active: Names
    """The adapters that `activate` chose, in its order."""
    merged: Names
    """Those whose change is in the weights now."""
    disabled: tuple[str, ...]
    """Those inside their `disabled()` context."""
    requires_grad: Mapping[str, AllNoneOrSome]
    """Adapter → whether what its method trains requires gradients."""
    devices: Mapping[str, tuple[str, ...]]
    """Adapter → where its tensors are."""
    modules: int
    """How many modules hold an adapter, those that are trained whole included."""
    trainable_parameters: int
    """The numbers that require gradients, in adapters and in the base."""
    total_parameters: int
    """The numbers of the base and of all adapters; a quantised weight counts as its matrix."""

    @property
    def enabled(self) -> AllNoneOrSome:
        """True if no adapter is disabled, False if all are, else "irregular"."""
        return all_none_or_some(name not in self.disabled for name in self.methods)

    def __str__(self) -> str:
        lines = [
            f"{self.base_model}: {share(self.trainable_parameters, self.total_parameters)} train"
        ]
        if self.methods:
            lines[0] += f"; {count(self.modules, 'adapted module')}"
        for name, words in self.methods.items():
            states, devices = ", ".join(self._states(name)), ", ".join(self.devices[name])
            lines.append(f"  {name}: {words}; {states}; {devices or 'no tensors'}")
        for state, names in (("active", self.active), ("merged", self.merged)):
            if names == "irregular":
                lines.append(f"  irregular: an adapter is {state} in some of its modules only")
        return "\n".join(lines if self.methods else [*lines, "  no adapters"])

    def _states(self, name: str) -> list[str]:
        names_by_state = {"merged": self.merged, "disabled": self.disabled, "active": self.active}
        states = [
            word for word, names in names_by_state.items() if names != "irregular" and name in names
        ]
        if not states:
            states = ["inactive" if self.active != "irregular" else "irregular"]
        return [*states, TRAINING[self.requires_grad[name]]]


def status(model: nn.Module) -> Status:
    """Returns the state of `model` and of the adapters in it.

    It says which adapters are active, merged, disabled or training, where they are, and how large.
    It works on a model without adapters too, and finds an adapted model inside a wrapper (DDP).

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=2), "0")
    >>> print(lk.status(model))
    Sequential: 22 of 57 parameters (38.60%) train; 1 adapted module
      default: lora; active, trains; cpu

    Raises:
        SettingError: `model` is not a model.
        StateError: PEFT has put adapters of its own into it.
    """
    root = root_of(model)
    model = next((module for module in root.modules() if adapters_in(module)), root)
    adapters = adapters_in(model)
    trainable, total = parameter_counts(model)
    return Status(
        base_model=class_without_mixins(model).__name__,
        methods={name: adapter.method.words for name, adapter in adapters.items()},
        active=_in_state(adapters, "active"),
        merged=_in_state(adapters, "merged"),
        disabled=tuple(
            name
            for name, adapter in adapters.items()
            if any(name in attached.off for attached in attachments_by(adapter))
        ),
        requires_grad={name: requires_grad(adapter) for name, adapter in adapters.items()},
        devices={name: devices_of(tensors_of(adapter)) for name, adapter in adapters.items()},
        modules=len(
            {id(attached) for adapter in adapters.values() for attached in attachments_by(adapter)}
        ),
        trainable_parameters=trainable,
        total_parameters=total,
    )


def _in_state(adapters: Mapping[str, InsertedAdapter], state: str) -> Names:
    """Returns the adapters in a state; "irregular" if one is, on some of its modules only."""
    in_state: dict[str, None] = {}
    for name, adapter in adapters.items():
        names_by_module = [getattr(attached, state) for attached in attachments_by(adapter)]
        if len({name in names for names in names_by_module}) > 1:
            return "irregular"
        in_state |= dict.fromkeys(other for names in names_by_module for other in names)
    return tuple(in_state)


def class_without_mixins(model: nn.Module) -> type[nn.Module]:
    """Returns the model's class, without what lorakin or FSDP2 mixed into it."""
    for cls in type(model).__mro__:
        if (
            issubclass(cls, nn.Module)
            and not issubclass(cls, Swapped)
            and not cls.__module__.startswith("torch.distributed.")
        ):
            return cls
    return nn.Module
