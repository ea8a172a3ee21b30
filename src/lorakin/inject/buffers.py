"""Buffers that a training forward changes, such as BatchNorm's statistics.

They are part of what training changes, but no parameters. So an adapter has its own of them while
it is in use, as it has its own copy of a module that it trains whole. The base's are set aside, and
come back whenever the adapter is off. Files hold the buffers that moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError, some
from lorakin.inject.attachments import adapter_prefixes
from lorakin.inject.quantised import is_quantised

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


def saved_buffers(model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor | None]:
    """Returns the base's buffers that its `state_dict` holds, except quantised layers', by name.

    None stands for a buffer that a forward is still to make.

    Args:
        model: the base, adapted or not.
        whole: paths of modules that an adapter trains whole; their copies have their own buffers.

    >>> list(saved_buffers(nn.Sequential(nn.BatchNorm1d(2)), ()))
    ['0.running_mean', '0.running_var', '0.num_batches_tracked']
    """
    found: dict[str, Tensor | None] = {}
    skip = (*adapter_prefixes(model), *(f"{path}." for path in whole))
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{path}.{leaf}" if path else leaf
            if leaf in module._non_persistent_buffers_set or name.startswith(skip):
                continue
            if not is_quantised(module):
                found[name] = buffer
    return found


def cloned(buffer: Tensor | None) -> Tensor | None:
    """Returns the buffer in memory of its own."""
    return None if buffer is None else buffer.detach().clone()


class Buffers:
    """The base's buffers of one model, set aside while adapters have their own."""

    def __init__(self) -> None:
        self.base: dict[str, Tensor | None] = {}
        self.shown: dict[str, str | None] = {}
        """Whose each one is that the model has now; None is the base."""

    def show(self, model: nn.Module, adapters: Mapping[str, InsertedAdapter]) -> None:
        """Puts the buffers of the adapters in use into the model; the base's where none has any."""
        using = [
            adapter
            for adapter in adapters.values()
            if adapter.effect.is_active and not adapter.effect.is_off
        ]
        for name, owner in self.owners(model, using).items():
            if owner != self.shown[name]:
                self._set(model, name, owner, adapters)

    def owners(self, model: nn.Module, using: Sequence[InsertedAdapter]) -> dict[str, str | None]:
        """Returns whose each buffer is if these adapters are in use; None is the base.

        Raises:
            SettingError: two of them have moved the same buffer.
        """
        found: dict[str, InsertedAdapter | None] = dict.fromkeys(self.base)
        for adapter in using:
            for name in adapter.buffers:
                if (other := found[name]) is None or not self._moved(model, other, name):
                    found[name] = adapter
                elif self._moved(model, adapter, name):
                    raise SettingError(
                        f"{other.name!r} and {adapter.name!r} have both moved {name} in training; "
                        "activate one of them"
                    )
        return {name: None if adapter is None else adapter.name for name, adapter in found.items()}

    def of(self, model: nn.Module, adapter: InsertedAdapter, name: str) -> Tensor | None:
        """Returns the adapter's own buffer of this name."""
        return _get(model, name) if self.shown[name] == adapter.name else adapter.buffers[name]

    def put(
        self, model: nn.Module, adapter: InsertedAdapter, name: str, value: Tensor | None
    ) -> None:
        """Sets the adapter's own buffer of this name."""
        own = self.of(model, adapter, name)
        if own is not None and value is not None and own.shape == value.shape:
            own.copy_(value)
        elif self.shown[name] == adapter.name:
            _put(model, name, cloned(value))
        else:
            adapter.buffers[name] = cloned(value)

    def all(self, model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor | None]:
        """Returns the base's own buffers that an adapter may move; see `saved_buffers`."""
        here = saved_buffers(model, whole)
        return {
            name: self.own(model, name) if name in self.shown else b for name, b in here.items()
        }

    def own(self, model: nn.Module, name: str) -> Tensor | None:
        """Returns the base's own buffer of this name."""
        return _get(model, name) if self.shown[name] is None else self.base[name]

    def moved(self, model: nn.Module, adapter: InsertedAdapter) -> dict[str, Tensor]:
        """Returns those of the adapter's buffers that differ from the base's."""
        moved = {
            n: self.of(model, adapter, n) for n in adapter.buffers if self._moved(model, adapter, n)
        }
        return {name: buffer for name, buffer in moved.items() if buffer is not None}

    def _moved(self, model: nn.Module, adapter: InsertedAdapter, name: str) -> bool:
        own, base = self.of(model, adapter, name), self.own(model, name)
        if own is None or base is None:
            return own is not base
        return not own.is_meta and not torch.equal(own, base.to(own))

    def add(self, model: nn.Module, adapter: InsertedAdapter) -> None:
        """Sets aside the base's buffers of which the adapter has its own."""
        for name in adapter.buffers:
            if name not in self.base:
                self.base[name], self.shown[name] = _get(model, name), None

    def give_up(self, model: nn.Module, adapter: InsertedAdapter) -> None:
        """Makes the adapter's buffers the base's, as a permanent merge needs."""
        for name in adapter.buffers:
            if self.shown[name] == adapter.name:
                self.base[name] = _get(model, name)

    def _set(
        self,
        model: nn.Module,
        name: str,
        owner: str | None,
        adapters: Mapping[str, InsertedAdapter],
    ) -> None:
        here, before = _get(model, name), self.shown[name]
        if before is None:
            self.base[name] = here
        elif before in adapters:
            adapters[before].buffers[name] = here
        new = self.base[name] if owner is None else adapters[owner].buffers[name]
        if new is not None and here is not None:
            new = new.to(here.device, here.dtype if here.is_floating_point() else new.dtype)
        _put(model, name, new)
        self.shown[name] = owner


def _get(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path)._buffers[leaf]


def _put(model: nn.Module, name: str, buffer: Tensor | None) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = buffer


def refusal_of_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """Returns why buffers from a file are not this model's; None if they are."""
    here = saved_buffers(model, ()) if saved else {}
    if unknown := sorted(saved.keys() - here.keys()):
        return f"it holds the buffers {some(unknown)}, which this model does not have"
    for name, tensor in saved.items():
        own = here[name]
        if own is not None and own.dim() != tensor.dim():
            shapes = f"{tuple(tensor.shape)}, this model's has {tuple(own.shape)}"
            return f"the buffer {name} has shape {shapes}"
    return None
