"""What adapters have attached to a module, and which names in a model are lorakin's.

The adapters' tensors are in `module.lorakin`, a module whose children are the adapters under their
own names. What else is known of them is in a plain object, `Attachments`, so no name can clash.
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
    """What adapters have attached to one module.

    Attributes:
        adapters: what each adapter has attached, by name.
        active: the adapters chosen by `activate`, in that order.
        merged: the adapters whose change is in the weight.
        off: the adapters switched off by `disabled()`.
        base_before_merge: the base's parameters by name, kept while adapters are merged.
        base_before_move: the base's weight, kept while an adapter (Delta-LoRA) moves a copy of it.
        merged_weight: what a quantised module multiplies by while adapters are merged.
        mixed_batch: says which adapter each row of a batch uses; None outside of `mixed_batch`.
        forward_depth: the calls of the module's own forward under way; they see the base's tensors.
        changes_weight_reads: whether the class has its own forward, which gets the changed weight.
        has_bias: whether an adapter has its own bias here.
        shape: the weight's shape when the first adapter was attached.
    """

    def __init__(self) -> None:
        self.adapters = Adapters(self)
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.off: set[str] = set()
        self.base_before_merge: dict[str, Tensor] = {}
        self.base_before_move: dict[str, Tensor] = {}
        self.merged_weight: Tensor | None = None
        self.mixed_batch: MixedBatch | None = None
        self.forward_depth = 0
        self.changes_weight_reads = False
        self.has_bias = False
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
        """Returns the names of the adapters here, in the order in which they were attached."""
        return list(self.adapters._modules)

    def values(self) -> list[Any]:
        """Returns what the adapters have attached, in the same order."""
        return list(self.adapters._modules.values())

    def names_in_use(self) -> list[str]:
        """Returns the active adapters that are neither merged nor off, in that order."""
        return [name for name in self.active if name not in self.merged and name not in self.off]

    def in_use(self) -> list[Any]:
        """Returns what the adapters in use have attached; those that only have a bias are left out.

        "In use" means active, and neither merged nor off.
        """
        children, unused = self.adapters._modules, (*self.merged, *self.off)
        in_use = [children[name] for name in self.active if name not in unused]
        if not self.has_bias:
            return in_use
        return [child for child in in_use if not isinstance(child, Bias)]

    def bias_of(self, name: str) -> nn.Parameter | None:
        """Returns this adapter's bias, which replaces the base's; None if it has none."""
        return self.adapters._modules[name]._parameters.get(BIAS)  # type: ignore[union-attr]

    def owner_of_bias(self) -> str | None:
        """Returns the name of the adapter in use that has a bias here, or None.

        A mixed batch has none.
        """
        if self.mixed_batch is None:
            for name in self.names_in_use():
                if self.bias_of(name) is not None:
                    return name
        return None

    def _note_biases(self) -> None:
        self.has_bias = any(self.bias_of(name) is not None for name in self.names())

    def apply(self, fn: Any) -> None:
        """Applies `fn`, which moves or casts tensors, to the kept tensors of the base."""
        self.merged_weight = None if self.merged_weight is None else fn(self.merged_weight)
        for kept in (self.base_before_merge, self.base_before_move):
            for key, tensor in kept.items():
                moved = fn(tensor.data)
                if moved.is_meta == tensor.is_meta:
                    # The object stays the same, so that tied modules stay tied.
                    tensor.data = moved
                elif isinstance(tensor, nn.Parameter):
                    kept[key] = nn.Parameter(moved, tensor.requires_grad)
                else:
                    kept[key] = moved


class Bias(nn.Module):
    """What an adapter attaches to a module of which it trains only the bias."""

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
        self._attachments.apply(fn)
        return self


def attachments_of(module: nn.Module) -> Attachments:
    """Returns the attachments of an adapted module.

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
    """Returns the attachments of a module; None if it has none."""
    adapters = module._modules.get(KEY)
    return adapters._attachments if isinstance(adapters, Adapters) else None


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Returns the prefixes of the names of the adapters' tensors in `model`, for `startswith`.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1))
    >>> adapter_prefixes(model)
    ('0.lorakin.',)
    """
    modules = model.named_modules(remove_duplicate=False)
    return tuple(f"{path}." for path, module in modules if isinstance(module, Adapters))


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the base's present parameters, each under all its names: merging may separate ties.

    `model_registry.original_parameters` returns what they are without adapters.
    """
    skip = adapter_prefixes(model)
    parameters = model.named_parameters(remove_duplicate=False)
    return [(name, parameter) for name, parameter in parameters if not name.startswith(skip)]


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the `state_dict` of `module` without the tensors of adapters.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1))
    >>> list(base_state(model))
    ['0.weight', '0.bias']
    """
    skip = adapter_prefixes(module)
    return {key: t for key, t in module.state_dict().items() if not key.startswith(skip)}
