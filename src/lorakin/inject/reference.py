"""The base model beside the adapted one, in the same memory, such as DPO compares."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from torch import nn

from lorakin.errors import SettingError
from lorakin.inject.class_swap import Swapped, combined
from lorakin.inject.model_registry import adapters_in, root_of


class Reference(Swapped):
    """Mixed in before the class of a model's shallow copy: its forwards run without adapters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as off:
            for adapter in adapters_in(vars(self)["_adapted"]).values():
                off.enter_context(adapter.effect.disabled())
            return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> Reference:
        """Does nothing: the modules belong to the adapted model, which sets their mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Reference:
        """Does nothing: the parameters are the adapted model's. Use `torch.no_grad()`."""
        return self


def reference(model: nn.Module) -> nn.Module:
    """Returns the model without its adapters: another object with the same parameters.

    Give it as `ref_model` to TRL's DPOTrainer, which would load the base a second time. It is the
    base when it is called and in `generate`; its parts, as `reference.model`, are the adapted
    model's, and so is its mode.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> x, base = torch.ones(1, 3), model(torch.ones(1, 3))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1))
    >>> _ = torch.nn.init.ones_(model[0].lorakin.default.B)  # as training might have
    >>> torch.equal(lk.reference(model)(x), base), torch.equal(model(x), base)
    (True, False)

    Raises:
        SettingError: there are no adapters in it.
    """
    model = root_of(model)
    if not adapters_in(model):
        raise SettingError(
            "a reference is the model without its adapters, but it has none; call "
            "lorakin.adapt(model, …) first"
        )
    view = copy.copy(model)
    # In `vars`, so that the adapted model does not become a submodule of the view.
    vars(view)["_adapted"] = model
    view.__class__ = combined(Reference, type(model))
    return view
