"""What a model remembers about the adapters in it, and what it does for all of them together."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.inject import experts, quantised
from lorakin.inject.adapted import is_adapted, module_at
from lorakin.inject.attachments import (
    Attachments,
    adapter_prefixes,
    attachments_or_none,
    base_parameters,
)
from lorakin.inject.buffers import Buffers
from lorakin.inject.model_hooks import ModelHooks
from lorakin.inject.ties import Ties

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter

NO_ADAPTERS = "none (name the model that was adapted, not a part of it or what wraps it)"


@dataclasses.dataclass
class Registry:
    """What a model remembers about the adapters in it, in its attribute `_lorakin`."""

    adapters: dict[str, InsertedAdapter] = dataclasses.field(default_factory=dict)
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict)
    hook: Any = None
    ties: Ties | None = None
    flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    laid_out: list[nn.Module] = dataclasses.field(default_factory=list)
    model_hooks: ModelHooks | None = None
    buffers: Buffers = dataclasses.field(default_factory=Buffers)
    ignored: dict[nn.Module, set[str]] = dataclasses.field(default_factory=dict)
    """What `_keys_to_ignore_on_save` of a module holds that is lorakin's."""


def adapters_in(model: nn.Module) -> dict[str, InsertedAdapter]:
    """The adapters in `model`, by name."""
    return dict(registry_of(model).adapters)


def registry_of(model: nn.Module) -> Registry:
    """The model's registry; of a model without adapters, an empty one that it does not hold."""
    registry = vars(model).get("_lorakin") or Registry()
    assert isinstance(registry, Registry)
    return registry


def original_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters by name, whatever adapters do with them.

    Those of modules that an adapter trains whole are left out.
    """
    whole = tuple(
        f"{path}."
        for adapter in registry_of(model).adapters.values()
        for path in adapter.placement.whole_modules
    )
    own: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model):
        if whole and name.startswith(whole):
            continue
        path, _, leaf = name.rpartition(".")
        module: Any = module_at(model, path)
        aside = attachments_or_none(module) or Attachments()
        base_stack = experts.base_stack(module, leaf)
        own[name] = (
            aside.base_before_move.get(leaf, aside.base_before_merge.get(leaf, parameter))
            if base_stack is None
            else base_stack
        )
    return own


def attachments_in(model: nn.Module) -> list[Attachments]:
    """What hangs on the model's modules, once each."""
    found = [
        attached
        for adapter in registry_of(model).adapters.values()
        for attached in adapter.tensors.attachments()
    ]
    return list(dict.fromkeys(found))


def root_of(model: nn.Module) -> nn.Module:
    """`model` itself, or the module that `torch.compile` wrapped.

    Raises:
        SettingError: it is no model.
        StateError: PEFT has put adapters of its own into the model.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise SettingError(f"expected a model, a torch.nn.Module, not {model!r}")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and (
        taken := [path for path, m in inner.named_modules() if isinstance(m, peft.BaseTunerLayer)]
    ):
        raise StateError(
            f"PEFT has adapted this model ({taken[0]}, …); take its adapters out first "
            "(model.unload(), or model.merge_and_unload() to keep them), or save them with PEFT "
            "and load the files with lorakin.load"
        )
    return inner


def update_model_hooks(model: nn.Module, registry: Registry) -> None:
    """Let `save_pretrained` write the base alone, and a load that skips the adapters warn.

    With no adapter left, undo that and give the base its `requires_grad` flags back.
    """
    for module in model.modules():
        # In sentence-transformers it is a property, made from the parts' own.
        by_its_parts = isinstance(getattr(type(module), "_keys_to_ignore_on_save", None), property)
        if hasattr(module, "_keys_to_ignore_on_save") and not by_its_parts:
            model_like: Any = module
            skip, every = adapter_prefixes(module), module.named_parameters(remove_duplicate=False)
            own = {key for key, _ in every if key.startswith(skip)}
            others = set(model_like._keys_to_ignore_on_save or ()) - registry.ignored.get(
                module, set()
            )
            registry.ignored[module] = own
            model_like._keys_to_ignore_on_save = others | own
    if registry.adapters and registry.hook is None:
        registry.flags = quantised.take_flags(model)
        registry.model_hooks = ModelHooks(model, registry.adapters)
        registry.hook = model.register_load_state_dict_post_hook(_warn_of_missing_adapters)  # type: ignore[no-untyped-call]
        registry.ties = Ties(model)
    watch_modules(model, registry)
    if not registry.adapters:
        registry.hook.remove()
        if registry.model_hooks is not None:
            registry.model_hooks.remove()
        vars(model).update(registry.flags)
        quantised.give_back(registry.laid_out)
        for key, parameter in base_parameters(model):
            parameter.requires_grad_(registry.requires_grad.get(key, parameter.requires_grad))
        del model.__dict__["_lorakin"]


def watch_modules(model: nn.Module, registry: Registry) -> None:
    """Let the model check before each forward that its adapted modules are still there."""
    if registry.model_hooks is not None:
        paths = [p for adapter in registry.adapters.values() for p in adapter.tensors.paths()]
        called = [p for p in paths if not isinstance(module_at(model, p), experts.ExpertMatrix)]
        registry.model_hooks.hold(model, (p for p in called if is_adapted(module_at(model, p))))


def _warn_of_missing_adapters(model: nn.Module, incompatible: Any) -> None:
    skip = adapter_prefixes(model)
    missing = [key for key in incompatible.missing_keys if key.startswith(skip)]
    if missing:
        warnings.warn(
            f"the state dict just loaded has no tensors for {len(missing)} entries of this model's "
            f"adapters ({missing[0]}, …), which keep their present values. A checkpoint of "
            "transformers' Trainer holds the base alone unless the trainer went through "
            "lorakin.training.prepare_trainer(trainer); load adapters with lorakin.load",
            LorakinWarning,
            stacklevel=3,
        )
