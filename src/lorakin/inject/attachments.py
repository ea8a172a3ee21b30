"""What hangs on an adapted module, and which names in a model are lorakin's.

The adapters' tensors are in `module.lorakin`, a module whose children are the adapters under their
own names. What else is known of them is in a plain object beside it, so no name can clash with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lorakin.inject.mixed_batch import MixedBatch

KEY = "lorakin"
"""The name of an adapted module's child that holds its adapters."""
BIAS = "bias"
"""The name of a module's bias, and of an adapter's own bias."""


class Attachments:
    """What hangs on one module.

    Attributes:
        adapters: what each adapter has here, by name.
        active: the adapters chosen by `activate`, in that order.
        merged: those whose change is in the weight.
        off: those switched off by `disabled()`.
        base: the base's parameters, set aside while adapters are merged.
        unmoved: the base's weight, set aside while an adapter moves a copy of it.
        dense: what a quantised module multiplies by while adapters are merged.
        mixed_batch: says which adapter each row of a batch uses; None outside of one.
        inside: counts calls of the module's own forward under way; they see the base's tensors.
        by_weight: the class has a forward of its own, which is given the changed weight.
        biased: an adapter has a bias of its own here.
        shape: the weight's when the first adapter came.
    """

    def __init__(self) -> None:
        self.adapters = Adapters(self)
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.off: set[str] = set()
        self.base: dict[str, Tensor] = {}
        self.unmoved: dict[str, Tensor] = {}
        self.dense: Tensor | None = None
        self.mixed_batch: MixedBatch | None = None
        self.inside = 0
        self.by_weight = False
        self.biased = False
        self.shape: torch.Size | None = None

    def __getitem__(self, name: str | None) -> Any:
        return self.adapters._modules[name]  # type: ignore[index]

    def __setitem__(self, name: str, child: nn.Module) -> None:
        self.adapters._modules[name] = child
        self._note_biases()

    def __delitem__(self, name: str) -> None:
        del self.adapters._modules[name]
        self._note_biases()
        self.active = tuple(other for other in self.active if other != name)
        self.off.discard(name)

    def __contains__(self, name: str) -> bool:
        return name in self.adapters._modules

    def __len__(self) -> int:
        return len(self.adapters._modules)

    def names(self) -> list[str]:
        """Returns the adapters here, in the order in which they came."""
        return list(self.adapters._modules)

    def values(self) -> list[Any]:
        """Returns what hangs here, in the same order."""
        return list(self.adapters._modules.values())

    def names_in_use(self) -> list[str]:
        """Returns the active adapters that are neither merged nor off, in that order."""
        return [name for name in self.active if name not in self.merged and name not in self.off]

    def in_use(self) -> list[Any]:
        """Returns what these adapters have here, except those with nothing but a bias here."""
        children, set_aside = self.adapters._modules, (*self.merged, *self.off)
        here = [children[name] for name in self.active if name not in set_aside]
        return [child for child in here if not isinstance(child, Bias)] if self.biased else here

    def bias_of(self, name: str) -> nn.Parameter | None:
        """Returns this adapter's bias, which replaces the base's; None if it has none."""
        return self.adapters._modules[name]._parameters.get(BIAS)  # type: ignore[union-attr]

    def owner_of_bias(self) -> str | None:
        """Returns the adapter in use that has a bias here; None in a mixed batch, too."""
        if self.mixed_batch is None:
            for name in self.names_in_use():
                if self.bias_of(name) is not None:
                    return name
        return None

    def _note_biases(self) -> None:
        self.biased = any(self.bias_of(name) is not None for name in self.names())

    def move(self, fn: Any) -> None:
        """Applies `fn`, which moves or casts the model's tensors, to what is set aside."""
        self.dense = None if self.dense is None else fn(self.dense)
        for aside in (self.base, self.unmoved):
            for key, tensor in aside.items():
                moved = fn(tensor.data)
                if moved.is_meta == tensor.is_meta:
                    tensor.data = moved  # the same object, so that tied modules stay tied
                elif isinstance(tensor, nn.Parameter):
                    aside[key] = nn.Parameter(moved, tensor.requires_grad)
                else:
                    aside[key] = moved


class Bias(nn.Module):
    """What an adapter has on a module of which it trains only the bias."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.register_parameter(BIAS, bias)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Returns the method's tensors here: none."""
        return {}

    def slots(self) -> dict[str, Any]:
        """Returns its slots: none."""
        return {}


class Adapters(nn.Module):
    """The adapters of one module, as children under their own names."""

    def __init__(self, attached: Attachments) -> None:
        super().__init__()
        self._attachments = attached

    def _apply(self, fn: Any, recurse: bool = True) -> Adapters:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._attachments.move(fn)
        return self


def attachments_of(module: nn.Module) -> Attachments:
    """Returns what hangs on an adapted module.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1), name="mine")
    >>> attachments_of(model[0]).names()
    ['mine']
    """
    adapters: Any = module._modules[KEY]
    attached: Attachments = adapters._attachments
    return attached


def attachments_or_none(module: nn.Module) -> Attachments | None:
    """Returns what hangs on a module; None if nothing does."""
    adapters = module._modules.get(KEY)
    return adapters._attachments if isinstance(adapters, Adapters) else None


def ours(model: nn.Module) -> tuple[str, ...]:
    """Returns how the names of lorakin's tensors in `model` begin, for `str.startswith`.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1))
    >>> ours(model)
    ('0.lorakin.',)
    """
    every = model.named_modules(remove_duplicate=False)
    return tuple(f"{path}." for path, module in every if isinstance(module, Adapters))


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the base's parameters, each under all its names: merging may separate ties."""
    skip = ours(model)
    named = model.named_parameters(remove_duplicate=False)
    return [(name, parameter) for name, parameter in named if not name.startswith(skip)]


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the `state_dict` of `module` without what adapters hang on it.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1))
    >>> list(base_state(model))
    ['0.weight', '0.bias']
    """
    skip = ours(module)
    return {key: t for key, t in module.state_dict().items() if not key.startswith(skip)}
