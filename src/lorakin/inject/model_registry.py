"""What a model remembers about the adapters in it, and what it does for all of them together."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
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
    """What a model remembers about the adapters in it, in its attribute `_lorakin`.

    Attributes:
        adapters: the adapters by name, in the order in which they came.
        requires_grad: what `requires_grad` of the base's parameters was, by name.
        load_hook: the hook that warns of a state dict without the adapters' tensors.
        ties: the parameters that modules share; see `ties.py`.
        quantised_flags: the flags that call the model quantised, which adapting has cleared.
        without_inference_kernel: quantised modules whose inference kernel was switched off.
        model_hooks: the forward hooks of the model.
        buffers: the base's buffers of which adapters have their own.
        ignored: what lorakin has added to `_keys_to_ignore_on_save` of each module.
    """

    adapters: dict[str, InsertedAdapter] = dataclasses.field(default_factory=dict)
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict)
    load_hook: Any = None
    ties: Ties | None = None
    quantised_flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    without_inference_kernel: list[nn.Module] = dataclasses.field(default_factory=list)
    model_hooks: ModelHooks | None = None
    buffers: Buffers = dataclasses.field(default_factory=Buffers)
    ignored: dict[nn.Module, set[str]] = dataclasses.field(default_factory=dict)


def adapters_in(model: nn.Module) -> dict[str, InsertedAdapter]:
    """Returns the adapters in `model`, by name."""
    return dict(registry_of(model).adapters)


def registry_of(model: nn.Module) -> Registry:
    """Returns the model's registry; an empty one, not stored, for a model without adapters."""
    registry = vars(model).get("_lorakin") or Registry()
    assert isinstance(registry, Registry)
    return registry


def original_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base's parameters by name, as they are without adapters.

    Those of modules that an adapter trains whole are left out. `attachments.base_parameters`
    returns the present ones.
    """
    whole = tuple(
        f"{path}."
        for adapter in registry_of(model).adapters.values()
        for path in adapter.placement.whole_modules
    )
    originals: dict[str, Tensor] = {}
    for name, parameter in base_parameters(model):
        if whole and name.startswith(whole):
            continue
        path, _, leaf = name.rpartition(".")
        module: Any = module_at(model, path)
        original = experts.base_stack(module, leaf)
        if original is None:
            attached = attachments_or_none(module) or Attachments()
            kept = {**attached.base_before_merge, **attached.base_before_move}
            original = kept.get(leaf, parameter)
        originals[name] = original
    return originals


def attachments_in(model: nn.Module) -> list[Attachments]:
    """Returns the attachments of the model's modules, once each."""
    adapters = registry_of(model).adapters.values()
    return list(dict.fromkeys(a for adapter in adapters for a in adapter.tensors.attachments()))


def root_of(model: nn.Module) -> nn.Module:
    """Returns `model` itself, or the module that `torch.compile` wrapped.

    Raises:
        SettingError: it is not a model.
        StateError: PEFT has put adapters of its own into the model.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise SettingError(f"expected a model, a torch.nn.Module, not {model!r}")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and (
        adapted := [path for path, m in inner.named_modules() if isinstance(m, peft.BaseTunerLayer)]
    ):
        raise StateError(
            f"PEFT has adapted this model ({adapted[0]}, …); take its adapters out first "
            "(model.unload(), or model.merge_and_unload() to keep them), or save them with PEFT "
            "and load the files with lorakin.load"
        )
    return inner


def check_no_mixed_batch(model: nn.Module, change: str) -> None:
    """Checks that the model is in no `mixed_batch`, where adapters cannot be `change`.

    Raises:
        StateError: it is in one.
    """
    if any(attached.mixed_batch is not None for attached in attachments_in(model)):
        raise StateError(
            "inside mixed_batch the adapters are what they were when it began; none can be "
            f"{change}"
        )


def check_base_in_place(adapters: Mapping[str, InsertedAdapter], purpose: str) -> None:
    """Checks that none of the adapters has moved the base weights in place.

    Raises:
        StateError: one has.
    """
    if moved := [name for name, adapter in adapters.items() if adapter.effect.has_moved_base]:
        raise StateError(
            f"adapter {moved[0]!r} has moved the base weights in place, so others cannot be used "
            "beside it; save and load it (files hold the form that leaves the base alone), or "
            f"remove it before {purpose}"
        )


def update_model_hooks(model: nn.Module, registry: Registry) -> None:
    """Installs what an adapted model needs beside its modules; takes it off after the last adapter.

    These are the model's hooks, flags, ties, and what `save_pretrained` leaves out.
    """
    _hide_from_save_pretrained(model, registry)
    if registry.adapters and registry.load_hook is None:
        _install(model, registry)
    watch_modules(model, registry)
    if not registry.adapters:
        _uninstall(model, registry)


def _hide_from_save_pretrained(model: nn.Module, registry: Registry) -> None:
    """Lets `save_pretrained` of the model and its parts write the base alone."""
    for module in model.modules():
        # In sentence-transformers it is a property, made from those of the parts.
        is_property = isinstance(getattr(type(module), "_keys_to_ignore_on_save", None), property)
        if not hasattr(module, "_keys_to_ignore_on_save") or is_property:
            continue
        part: Any = module
        prefixes, parameters = adapter_prefixes(part), part.named_parameters(remove_duplicate=False)
        ours = {key for key, _ in parameters if key.startswith(prefixes)}
        others = set(part._keys_to_ignore_on_save or ()) - registry.ignored.get(part, set())
        registry.ignored[part] = ours
        part._keys_to_ignore_on_save = others | ours


def _install(model: nn.Module, registry: Registry) -> None:
    registry.quantised_flags = quantised.clear_flags(model)
    registry.model_hooks = ModelHooks(model, registry.adapters)
    registry.load_hook = model.register_load_state_dict_post_hook(_warn_of_missing_adapters)  # type: ignore[no-untyped-call]
    registry.ties = Ties(model)


def _uninstall(model: nn.Module, registry: Registry) -> None:
    registry.load_hook.remove()
    if registry.model_hooks is not None:
        registry.model_hooks.remove()
    vars(model).update(registry.quantised_flags)
    quantised.restore_inference_kernel(registry.without_inference_kernel)
    for key, parameter in base_parameters(model):
        parameter.requires_grad_(registry.requires_grad.get(key, parameter.requires_grad))
    del model.__dict__["_lorakin"]


def watch_modules(model: nn.Module, registry: Registry) -> None:
    """Lets the model check before each forward that its adapted modules are still in place."""
    if registry.model_hooks is not None:
        paths = [p for adapter in registry.adapters.values() for p in adapter.tensors.paths()]
        called = [p for p in paths if not isinstance(module_at(model, p), experts.ExpertMatrix)]
        adapted = (path for path in called if is_adapted(module_at(model, path)))
        registry.model_hooks.watch(model, adapted)


def _warn_of_missing_adapters(model: nn.Module, incompatible: Any) -> None:
    prefixes = adapter_prefixes(model)
    missing = [key for key in incompatible.missing_keys if key.startswith(prefixes)]
    if missing:
        warnings.warn(
            f"the state dict just loaded has no tensors for {len(missing)} entries of this model's "
            f"adapters ({missing[0]}, …), which keep their present values. A checkpoint of "
            "transformers' Trainer holds the base alone unless the trainer went through "
            "lorakin.training.prepare_trainer(trainer); load adapters with lorakin.load",
            LorakinWarning,
            stacklevel=3,
        )
