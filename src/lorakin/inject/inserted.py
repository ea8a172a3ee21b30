"""An adapter in a model: putting it in and taking it out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError
from lorakin.family import Method, Slot
from lorakin.inject import layer_kinds, quantised
from lorakin.inject.active_adapters import activate
from lorakin.inject.adapted import (
    Child,
    attach,
    detach,
    exchange_moved_weight,
    is_adapted,
    module_at,
    refusal_to_attach,
)
from lorakin.inject.attachments import Attachments, Bias, attachments_of, base_parameters
from lorakin.inject.biases import base_bias, initial_biases
from lorakin.inject.branch import Branch, Copy, slot_trains
from lorakin.inject.buffers import cloned
from lorakin.inject.effect import Effect, check_base_in_place, check_no_mixed_batch
from lorakin.inject.layer_kinds import PeftGroupedConvolution
from lorakin.inject.model_registry import Registry, registry_of, update_model_hooks
from lorakin.inject.placement import Placement
from lorakin.inject.run import CALLBACKS, AdapterRun
from lorakin.inject.tensors import AdapterTensors
from lorakin.inject.threads import alone
from lorakin.inject.trainable_tokens import base_rows, rows_for


class InsertedAdapter:
    """An adapter in a model, made of its parts. `lorakin.Adapter` adds files and optimizers."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        adapter = super().__new__(cls)
        for watcher in CALLBACKS:  # here, so that they hear of a deep copy of the model too
            watcher.made(adapter)
        return adapter

    def __init__(self, model: nn.Module, name: str, placement: Placement) -> None:
        self.model = model
        self.name = name
        self.placement = placement
        self.is_fresh = False
        self.buffers: dict[str, Tensor | None] = {}
        self.tensors = AdapterTensors(self)
        self.effect = Effect(self)
        self.run = AdapterRun(self)

    @property
    def method(self) -> Method:
        """The method, with what its run has decided."""
        return self.run.method

    @alone
    def install(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Hang the adapter's tensors on the planned modules and make this adapter the active one.

        Args:
            tensors: the tensors of each module, by path and slot. One object in several places
                becomes one parameter, on each device.
            copies: the state of the modules trained whole, by path; without it they start as the
                base's.
            buffers: what its own buffers hold, by name; without it they start as the base's.
            rows: the rows of tokens, by path; without it they start as the base's.
            biases: its own biases, by the module's path; without it they start as the base's.

        A parameter requires gradients if its slot is `trained`. Nothing is changed if anything
        fails.

        Raises:
            SettingError: an unusable name, or one already taken.
            StateError: adapters are merged, or a module is in use in a way that does not go
                together.
        """
        registry = self._free_registry()
        modules = {path: module_at(self.model, path) for path in self.tensors.paths()}
        children = self._children(modules, tensors, copies, rows, biases)
        for path, child in children.items():
            if reason := refusal_to_attach(modules[path], self.name, child):
                raise StateError(f"{path} cannot be adapted: {reason}")

        registry.laid_out += quantised.keep_trainable(self.model)
        vars(self.model)["_lorakin"] = registry
        registry.adapters[self.name] = self
        for path, child in children.items():
            attach(modules[path], self.name, child.train(modules[path].training))
        update_model_hooks(self.model, registry)

        of_base = registry.buffers.all(self.model, self.placement.whole_modules)
        own = of_base if buffers is None else buffers
        self.buffers = {name: cloned(buffer) for name, buffer in own.items()}
        registry.buffers.add(self.model, self)
        activate(self.model, self.name)

    def _children(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Mapping[str, Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]] | None,
        rows: Mapping[str, Tensor] | None,
        biases: Mapping[str, Tensor] | None,
    ) -> dict[str, Child]:
        """What is to be attached to each module, by path; the arguments are those of `install`."""
        made: Made = {}
        given = initial_biases(self.model, self.placement.biases) if biases is None else biases
        own_biases = {path: _bias(modules[path], bias, made) for path, bias in given.items()}

        children: dict[str, Child] = {}
        for path, method in self.placement.methods.items():
            module = modules[path]
            kind = (
                PeftGroupedConvolution
                if path in self.placement.peft_grouped
                else layer_kinds.kind_of(module)
            )
            assert kind is not None
            shape = kind.shape(module)
            slots = method.slots_at(path, shape)
            parameters = {
                name: _parameter(slots[name], tensor, kind.device(module), made)
                for name, tensor in tensors[path].items()
            }
            children[path] = Branch(path, method, kind, shape, parameters, own_biases.get(path))

        for path in self.placement.whole_modules:
            twin = _plain_copy(modules[path]).requires_grad_(True)
            if copies is not None:
                twin.load_state_dict(copies[path])
            children[path] = Copy(twin)

        own_rows = base_rows(self.model, self.placement.tokens) if rows is None else rows
        children |= rows_for(modules, self.placement.tokens, own_rows)
        return children | {p: Bias(bias) for p, bias in own_biases.items() if p not in children}

    @alone
    def remove(self) -> None:
        """Take the adapter out.

        Merged weights are restored first. The last adapter to go restores the modules' classes,
        `requires_grad` flags and `save_pretrained` as they were. PEFT: `delete_adapter`, `unload`.
        """
        self.require_present()
        check_no_mixed_batch(self.model, "removed")
        if any(self.name in h.merged for h in self.tensors.attachments()):
            self.effect.unmerge()
        for path in self.tensors.paths():
            module = module_at(self.model, path)
            if is_adapted(module):  # another module may have been put in its place
                if not self.effect.is_off:
                    exchange_moved_weight(module)
                detach(module, self.name)
        registry = registry_of(self.model)
        del registry.adapters[self.name]
        registry.buffers.show(self.model, registry.adapters)
        update_model_hooks(self.model, registry)

    def freeze_base(self) -> None:
        """Stop training everything that is not an adapter's, remembering what trained before."""
        registry = registry_of(self.model)
        named = base_parameters(self.model)
        for key, parameter in named:
            registry.requires_grad.setdefault(key, parameter.requires_grad)
        for _, parameter in named:
            parameter.requires_grad_(False)

    @property
    def is_present(self) -> bool:
        """Whether the adapter is in its model."""
        return registry_of(self.model).adapters.get(self.name) is self

    @property
    def is_intact(self) -> bool:
        """Whether it is in its model, and on the modules that it was put on: none was exchanged."""
        try:
            return self.is_present and all(
                is_adapted(module_at(self.model, path)) for path in self.tensors.paths()
            )
        except AttributeError:
            return False

    def require_present(self) -> None:
        if not self.is_present:
            raise StateError(f"adapter {self.name!r} is no longer in the model")

    def _free_registry(self) -> Registry:
        registry = registry_of(self.model)
        if not self.name or not isinstance(self.name, str) or "." in self.name or "/" in self.name:
            raise SettingError(
                f"an adapter's name must be text without '.' and '/', not {self.name!r}"
            )
        if hasattr(Attachments().adapters, self.name):
            raise SettingError(
                f"an adapter cannot be called {self.name!r}: torch's modules have an attribute "
                f"of that name"
            )
        if self.name in registry.adapters:
            raise SettingError(
                f"the model already has an adapter {self.name!r}; remove it first, or choose "
                f"another name"
            )
        if merged := [
            name for name, adapter in registry.adapters.items() if adapter.effect.is_merged
        ]:
            raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before adding another")
        check_base_in_place(registry.adapters, "adding another")
        check_no_mixed_batch(self.model, "added")
        return registry

    def base_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The base model's own."""
        return base_parameters(self.model)


Made = dict[tuple[int, torch.device], nn.Parameter]
"""Tensor (by identity) and device → the parameter made of it, so that shared ones stay shared."""


def _parameter(slot: Slot, tensor: Tensor, device: torch.device, made: Made) -> nn.Parameter:
    """A slot's tensor as a parameter on its module's device; one that has values keeps them."""
    if (id(tensor), device) not in made:
        there = tensor.detach() if device.type == "meta" else tensor.detach().to(device)
        made[id(tensor), device] = nn.Parameter(there, slot_trains(slot, tensor))
    return made[id(tensor), device]


def _bias(module: nn.Module, bias: Tensor, made: Made) -> nn.Parameter:
    """A bias of the adapter's own as a parameter, where the module's is."""
    of_base, there = base_bias(module), bias.detach()
    if of_base is not None and not of_base.is_meta:
        there = there.to(of_base.device)
    return made.setdefault((id(bias), there.device), nn.Parameter(there))


def _plain_copy(module: nn.Module) -> nn.Module:
    """A copy of the base's own module, without what other adapters hang on it."""
    twin = copy.deepcopy(module)
    for part in [part for part in twin.modules() if is_adapted(part)]:
        for name in attachments_of(part).names():
            detach(part, name)
    return twin
