"""An adapter in a model: inserting and removing it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError
from lorakin.family import Method, Slot
from lorakin.inject import layer_kinds, quantised
from lorakin.inject.active_adapters import set_active
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
from lorakin.inject.cast_tensors import CastTensors
from lorakin.inject.effect import Effect
from lorakin.inject.layer_kinds import PeftGroupedConvolution
from lorakin.inject.model_registry import (
    Registry,
    check_base_in_place,
    check_no_mixed_batch,
    registry_of,
    update_model_hooks,
)
from lorakin.inject.placement import Placement
from lorakin.inject.run import CALLBACKS, AdapterRun
from lorakin.inject.tensors import AdapterTensors
from lorakin.inject.threads import one_at_a_time
from lorakin.inject.trainable_tokens import base_rows, row_branches


class InsertedAdapter:
    """The part of `lorakin.Adapter` that needs neither files nor optimizers.

    Attributes:
        model: the model that the adapter is in.
        name: its name there.
        placement: which modules it is on, and with what settings.
        is_fresh: whether this process made it; False if it was loaded.
        buffers: its values of the buffers that a training forward changes; see `buffers.py`.
        tensors: its parameters, by module.
        effect: whether, how strongly and in which form it acts.
        run: its training run.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        adapter = super().__new__(cls)
        # Here and not in __init__, so that callbacks are called for a deep copy of the model too.
        for callback in CALLBACKS:
            callback.made(adapter)
        return adapter

    def __init__(self, model: nn.Module, name: str, placement: Placement) -> None:
        self.model = model
        self.name = name
        self.placement = placement
        self.is_fresh = False
        self.buffers: dict[str, Tensor | None] = {}
        self.tensors = AdapterTensors(self)
        self.cast = CastTensors()
        self.effect = Effect(self)
        self.run = AdapterRun(self)

    @property
    def method(self) -> Method:
        """The method, with what its run has decided."""
        return self.run.method

    @one_at_a_time
    def install(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Attaches the adapter's tensors to the modules of its placement, and activates it.

        A parameter requires gradients if its slot is `trained`. Nothing is changed if anything
        fails.

        Args:
            tensors: the tensors of each module, by path and slot. One object in several places
                becomes one parameter.
            copies: the state of the modules trained whole, by path; without it they start as the
                base's.
            buffers: what its own buffers hold, by name; without it they start as the base's.
            rows: the rows of tokens, by path; without it they start as the base's.
            biases: its own biases, by the module's path; without it they start as the base's.

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

        registry.without_inference_kernel += quantised.keep_trainable(self.model)
        vars(self.model)["_lorakin"] = registry
        registry.adapters[self.name] = self
        self.cast.branches = [child for child in children.values() if isinstance(child, Branch)]
        for path, child in children.items():
            attach(modules[path], self.name, child.train(modules[path].training))
        update_model_hooks(self.model, registry)

        initial: Mapping[str, Tensor | None] = (
            registry.buffers.base_buffers(self.model, self.placement.whole_modules)
            if buffers is None
            else buffers
        )
        self.buffers = {name: cloned(buffer) for name, buffer in initial.items()}
        registry.buffers.add(self.model, self)
        set_active(self.model, self.name)

    def _children(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Mapping[str, Tensor]],
        copies: Mapping[str, Mapping[str, Tensor]] | None,
        rows: Mapping[str, Tensor] | None,
        biases: Mapping[str, Tensor] | None,
    ) -> dict[str, Child]:
        """Returns what to attach to each module, by path; the arguments are those of `install`."""
        shared: SharedParameters = {}
        if biases is None:
            biases = initial_biases(self.model, self.placement.biases)
        bias_of = {path: _bias(modules[path], bias, shared) for path, bias in biases.items()}

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
                name: _parameter(slots[name], tensor, kind.device(module), shared)
                for name, tensor in tensors[path].items()
            }
            branch = Branch(path, method, kind, shape, parameters, bias_of.get(path))
            branch.cast = self.cast
            children[path] = branch

        for path in self.placement.whole_modules:
            twin = _plain_copy(modules[path]).requires_grad_(True)
            if copies is not None:
                twin.load_state_dict(copies[path])
            children[path] = Copy(twin)

        if rows is None:
            rows = base_rows(self.model, self.placement.tokens)
        children |= row_branches(modules, self.placement.tokens, rows)
        return children | {p: Bias(bias) for p, bias in bias_of.items() if p not in children}

    @one_at_a_time
    def remove(self) -> None:
        """Takes the adapter out of its model; see `Adapter.remove`."""
        self.check_present()
        check_no_mixed_batch(self.model, "removed")
        if any(self.name in attached.merged for attached in self.tensors.attachments()):
            self.effect.unmerge()
        for path in self.tensors.paths():
            module = module_at(self.model, path)
            # Another module may have been put in its place.
            if is_adapted(module):
                # `disabled()` has put the base's weight back already.
                if not self.effect.is_off:
                    exchange_moved_weight(module)
                detach(module, self.name)
        registry = registry_of(self.model)
        del registry.adapters[self.name]
        registry.buffers.use(self.model, registry.adapters)
        update_model_hooks(self.model, registry)

    def freeze_base(self) -> None:
        """Freezes the base's parameters, and remembers which of them trained before."""
        registry = registry_of(self.model)
        parameters = base_parameters(self.model)
        for key, parameter in parameters:
            registry.requires_grad.setdefault(key, parameter.requires_grad)
        for _, parameter in parameters:
            parameter.requires_grad_(False)

    @property
    def is_present(self) -> bool:
        """Whether the adapter is in its model."""
        return registry_of(self.model).adapters.get(self.name) is self

    @property
    def is_intact(self) -> bool:
        """Whether it is in its model, and none of its modules was replaced by another."""
        try:
            return self.is_present and all(
                is_adapted(module_at(self.model, path)) for path in self.tensors.paths()
            )
        except AttributeError:
            return False

    def check_present(self) -> None:
        """Checks that the adapter is in its model.

        Raises:
            StateError: it was removed.
        """
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
                f"an adapter cannot be called {self.name!r}: torch's modules have an attribute of "
                "that name"
            )
        if self.name in registry.adapters:
            raise SettingError(
                f"the model already has an adapter {self.name!r}; remove it first, or choose "
                "another name"
            )
        merged = [name for name, adapter in registry.adapters.items() if adapter.effect.is_merged]
        if merged:
            raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before adding another")
        check_base_in_place(registry.adapters, "adding another")
        check_no_mixed_batch(self.model, "added")
        return registry


SharedParameters = dict[tuple[int, torch.device | None], nn.Parameter]
"""(id of a tensor, device; None if it trains) → its parameter: a shared tensor is one."""


def _parameter(
    slot: Slot, tensor: Tensor, device: torch.device, shared: SharedParameters
) -> nn.Parameter:
    """Returns a slot's tensor as a parameter on its module's device.

    One tensor of several modules is one parameter. If it trains, it is on the device of the first,
    and forwards of the others copy it; if not, each device has its own. A tensor with values stays
    where it is if the module is on the meta device.
    """
    trains = slot_trains(slot, tensor)
    key = (id(tensor), None if trains else device)
    if key not in shared:
        moved = tensor.detach() if device.type == "meta" else tensor.detach().to(device)
        shared[key] = nn.Parameter(moved, trains)
    return shared[key]


def _bias(module: nn.Module, bias: Tensor, shared: SharedParameters) -> nn.Parameter:
    """Returns an adapter's bias as a parameter on the device of the module's."""
    original, moved = base_bias(module), bias.detach()
    if original is not None and not original.is_meta:
        moved = moved.to(original.device)
    return shared.setdefault((id(bias), moved.device), nn.Parameter(moved))


def _plain_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of the base's module, without what other adapters have attached."""
    twin = copy.deepcopy(module)
    for part in [part for part in twin.modules() if is_adapted(part)]:
        for name in attachments_of(part).names():
            detach(part, name)
    return twin
