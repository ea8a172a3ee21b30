"""Buffers that a training forward changes, such as BatchNorm's statistics.

Training changes them, though they are not parameters. So each adapter has its values of them while
it is in use, as it has a copy of a module that it trains whole. The base's values are kept, and
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


def saved_buffers(model: nn.Module, whole_modules: Sequence[str]) -> dict[str, Tensor | None]:
    """Returns the base's buffers that its `state_dict` holds, except quantised layers', by name.

    None stands for a buffer that a forward is still to make.

    Args:
        model: the base, adapted or not.
        whole_modules: paths of modules that an adapter trains whole; their copies have buffers
            themselves.

    >>> list(saved_buffers(nn.Sequential(nn.BatchNorm1d(2)), ()))
    ['0.running_mean', '0.running_var', '0.num_batches_tracked']
    """
    buffers: dict[str, Tensor | None] = {}
    skip = (*adapter_prefixes(model), *(f"{path}." for path in whole_modules))
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            name = f"{path}.{leaf}" if path else leaf
            if leaf in module._non_persistent_buffers_set or name.startswith(skip):
                continue
            if not is_quantised(module):
                buffers[name] = buffer
    return buffers


def cloned(buffer: Tensor | None) -> Tensor | None:
    """Returns a copy of the buffer."""
    return None if buffer is None else buffer.detach().clone()


class Buffers:
    """The buffers of one model of which adapters have their own values.

    Attributes:
        base: name → the base's value, kept while an adapter's is in the model.
        owner: name → the adapter whose value the model has now; None for the base.
    """

    def __init__(self) -> None:
        self.base: dict[str, Tensor | None] = {}
        self.owner: dict[str, str | None] = {}

    def use(self, model: nn.Module, adapters: Mapping[str, InsertedAdapter]) -> None:
        """Puts the buffers of the adapters in use into the model; the base's where none has any."""
        in_use = [
            adapter
            for adapter in adapters.values()
            if adapter.effect.is_active and not adapter.effect.is_off
        ]
        for name, owner in self.owners(model, in_use).items():
            if owner != self.owner[name]:
                self._set(model, name, owner, adapters)

    def owners(self, model: nn.Module, in_use: Sequence[InsertedAdapter]) -> dict[str, str | None]:
        """Returns name → the adapter whose value these adapters would use; None is the base.

        Raises:
            SettingError: two of them have moved the same buffer.
        """
        owners: dict[str, InsertedAdapter | None] = dict.fromkeys(self.base)
        for adapter in in_use:
            for name in adapter.buffers:
                if (other := owners[name]) is None or not self._has_moved(model, other, name):
                    owners[name] = adapter
                elif self._has_moved(model, adapter, name):
                    raise SettingError(
                        f"{other.name!r} and {adapter.name!r} have both moved {name} in training; "
                        "activate one of them"
                    )
        return {name: None if owner is None else owner.name for name, owner in owners.items()}

    def adapter_buffer(
        self, model: nn.Module, adapter: InsertedAdapter, name: str
    ) -> Tensor | None:
        """Returns the adapter's value of this buffer."""
        return _get(model, name) if self.owner[name] == adapter.name else adapter.buffers[name]

    def put(
        self, model: nn.Module, adapter: InsertedAdapter, name: str, value: Tensor | None
    ) -> None:
        """Overwrites the adapter's value of this buffer."""
        buffer = self.adapter_buffer(model, adapter, name)
        if buffer is not None and value is not None and buffer.shape == value.shape:
            buffer.copy_(value)
        elif self.owner[name] == adapter.name:
            _put(model, name, cloned(value))
        else:
            adapter.buffers[name] = cloned(value)

    def base_buffers(
        self, model: nn.Module, whole_modules: Sequence[str]
    ) -> dict[str, Tensor | None]:
        """Returns the base's buffers that an adapter may move; see `saved_buffers`."""
        return {
            name: self.base_buffer(model, name) if name in self.owner else buffer
            for name, buffer in saved_buffers(model, whole_modules).items()
        }

    def base_buffer(self, model: nn.Module, name: str) -> Tensor | None:
        """Returns the base's value of this buffer."""
        return _get(model, name) if self.owner[name] is None else self.base[name]

    def moved(self, model: nn.Module, adapter: InsertedAdapter) -> dict[str, Tensor]:
        """Returns those of the adapter's buffers that differ from the base's."""
        moved = {
            name: self.adapter_buffer(model, adapter, name)
            for name in adapter.buffers
            if self._has_moved(model, adapter, name)
        }
        return {name: buffer for name, buffer in moved.items() if buffer is not None}

    def _has_moved(self, model: nn.Module, adapter: InsertedAdapter, name: str) -> bool:
        buffer = self.adapter_buffer(model, adapter, name)
        base = self.base_buffer(model, name)
        if buffer is None or base is None:
            return buffer is not base
        return not buffer.is_meta and not torch.equal(buffer, base.to(buffer))

    def add(self, model: nn.Module, adapter: InsertedAdapter) -> None:
        """Keeps the base's values of the buffers that the adapter has."""
        for name in adapter.buffers:
            if name not in self.base:
                self.base[name], self.owner[name] = _get(model, name), None

    def hand_to_base(self, model: nn.Module, adapter: InsertedAdapter) -> None:
        """Makes the adapter's buffers the base's, for a permanent merge."""
        for name in adapter.buffers:
            if self.owner[name] == adapter.name:
                self.base[name] = _get(model, name)

    def _set(
        self,
        model: nn.Module,
        name: str,
        owner: str | None,
        adapters: Mapping[str, InsertedAdapter],
    ) -> None:
        """Puts the value of `owner` into the model, and keeps the present value for its owner."""
        present, present_owner = _get(model, name), self.owner[name]
        if present_owner is None:
            self.base[name] = present
        elif present_owner in adapters:
            adapters[present_owner].buffers[name] = present
        value = self.base[name] if owner is None else adapters[owner].buffers[name]
        if value is not None and present is not None:
            dtype = present.dtype if present.is_floating_point() else value.dtype
            value = value.to(present.device, dtype)
        _put(model, name, value)
        self.owner[name] = owner


def _get(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path)._buffers[leaf]


def _put(model: nn.Module, name: str, buffer: Tensor | None) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = buffer


def refusal_of_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """Returns why buffers from a file do not fit this model; None if they do."""
    buffers = saved_buffers(model, ()) if saved else {}
    if unknown := sorted(saved.keys() - buffers.keys()):
        return f"it holds the buffers {some(unknown)}, which this model does not have"
    for name, tensor in saved.items():
        buffer = buffers[name]
        if buffer is not None and buffer.dim() != tensor.dim():
            shapes = f"{tuple(tensor.shape)}, this model's has {tuple(buffer.shape)}"
            return f"the buffer {name} has shape {shapes}"
    return None
