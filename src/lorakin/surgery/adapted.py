"""The class swap: an adapted module becomes a subclass of its own class, with adapters hung on it as `.lorakin`.

The module keeps its identity, its name, its parameters and their `state_dict` keys; the adapters' tensors add keys of
the form `<path>.lorakin.<adapter>.<tensor>`. When the last adapter goes, the module gets its class back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.family import Method, Pair, Role, Shape, Weight, widened
from lorakin.surgery import experts, fused
from lorakin.surgery.autograd import Seen
from lorakin.surgery.fused import Ready
from lorakin.surgery.layers import Layer, LinearLayer, kind_of
from lorakin.surgery.swapped import Swapped, base_class, combined, swap_class


def trains(role: Role, tensor: Tensor) -> bool:
    """Whether a tensor is trained: as its role says, unless it is empty, which some optimizers cannot bear."""
    return role.trained and bool(tensor.numel())


class Site(nn.Module):
    """One adapter on one module: its method's tensors there, as parameters."""

    def __init__(
        self, path: str, method: Method, layer: type[Layer], shape: Shape, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__()
        self.path = path
        self.method = method
        self.layer = layer
        self.shape = shape
        self.siblings = path.rpartition(".")[0]
        self._squares: tuple[Seen, Tensor] | None = None
        self._ready: tuple[Seen, Ready] | None = None
        for slot, parameter in parameters.items():
            self.register_parameter(slot, parameter)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by slot, as the members named them."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Take other values, in place, so that optimizers keep holding the parameters; also of another rank."""
        own = self.tensors()
        for slot in own.keys() - tensors.keys():
            delattr(self, slot)
        for slot, tensor in tensors.items():
            if slot not in own:
                device = next(iter(own.values())).device
                own_memory = tensor.to(device, copy=True)  # torch's, aligned as ever: else sums differ in their last bits
                self.register_parameter(slot, nn.Parameter(own_memory, requires_grad=False))
            elif own[slot].shape == tensor.shape:
                own[slot].copy_(tensor)
            else:
                was_empty = not own[slot].numel()
                own[slot].grad, own[slot].data = None, tensor.to(own[slot], copy=True)
                if was_empty or not tensor.numel():
                    own[slot].requires_grad_(trains(self.roles()[slot], tensor))

    def roles(self) -> dict[str, Role]:
        """What each of them is to an optimizer."""
        return self.method.roles(self.path, self.shape, self.tensors())

    def wide(self) -> dict[str, Tensor]:
        """The tensors in float32 or, where they are float64, in float64."""
        return widened(self.tensors())

    def pair(self, weight: Tensor | Weight) -> Pair:
        """The method's pair over `weight` (outputs, inputs), in float32 or float64."""
        return self.method.pair(self.wide(), self.shape, weight)

    def fused(self, module: Any, x: Any) -> Tensor | None:
        """The output of the adapted module, the base's part included, where `surgery/fused.py` can compute it."""
        if self.layer is not LinearLayer or not fused.applies(x, module.weight):
            return None
        tensors, dropout = self.wide(), self.method.dropout if self.training else 0.0
        chain = self.method.chain(tensors)
        if chain is not None:
            return fused.linear_with_chain(x, module.weight, module.bias, chain, dropout, self.siblings)
        if not dropout and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return fused.linear_with_ready(x, module.weight, module.bias, self._as_ready(tensors, module.weight))
        self._ready = None
        pair, scale = self.factors(tensors, module.weight)
        if pair.gain is not None and dropout:  # which needs another product with the weight
            return None
        return fused.linear_with_pair(x, module.weight, module.bias, pair, scale, dropout)

    def factors(self, tensors: Mapping[str, Tensor], matrix: Tensor) -> tuple[Pair, float]:
        """The pair and its scale, over a weight of which the squares of rows are remembered for as long as it is the same."""
        weight = Weight(matrix.detach())
        if self._squares is not None and self._squares[0].is_still(matrix):
            weight.squares = self._squares[1]
            return self.method.factors(tensors, self.shape, weight)
        factors = self.method.factors(tensors, self.shape, weight)
        if "squares" in vars(weight) and (seen := Seen.of(matrix)):
            self._squares = seen, weight.squares
        return factors

    def _as_ready(self, tensors: Mapping[str, Tensor], matrix: Tensor) -> Ready:
        """The pair as inference takes it; of an adapter that does not train made once for as long as nothing changes."""
        there = (matrix, *self.tensors().values())
        if self._ready is not None and self._ready[0].is_still(*there):
            return self._ready[1]
        ready = Ready.of(*self.factors(tensors, matrix), matrix.dtype)
        trained = any(tensor.requires_grad for tensor in self.parameters(recurse=False))
        seen = None if trained else Seen.of(*there)
        self._ready = None if seen is None else (seen, ready)
        return ready

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": None, "_ready": None}

    def branch(self, module: Any, x: Tensor, pair: Pair) -> Tensor:
        """up(down x), without a gain, in the base's dtype."""
        dtype = self.layer.dtype(module, x)
        return self.layer.branch(module, x, Pair(pair.up.to(dtype), pair.down.to(dtype)))

    def forward(self, module: Any, x: Tensor, out: Tensor) -> Tensor:
        """What the adapter adds to the module's output `out`: (g−1)⊙(W0 x̃) + g⊙up(down x̃), in the base's dtype."""
        hung = module.lorakin
        dropped = self.layer.drop(x, self.method.dropout, self.training)
        pair = self.pair(self.layer.weight(module))
        change = self.branch(module, dropped, pair)
        if pair.gain is None:
            return change
        if dropped is x and not hung.merged:  # then W0 x is there already
            bias = getattr(module, "bias", None)
            product = out if bias is None else out - self.layer.per_output(bias, module)
        else:
            product = self.layer.product(module, dropped, hung.base.get("weight", module._parameters.get("weight")))
        gain = self.layer.per_output(pair.gain, module)
        return (gain * change + (gain - 1) * product).to(change.dtype)


class Copy(nn.Module):
    """A whole module that an adapter trains in place of the base's: a copy of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Hung(nn.Module):
    """What hangs on one module: its adapters by name, which of them are in use, and what of the base's own is set aside.

    The adapters are children under their own names. `base` holds the base's parameters while adapters are merged,
    `unmoved` its weight while an adapter moves a copy of that, `dense` what a quantised module multiplies by while merged,
    `rows` which adapter each row of a mixed batch uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.off: set[str] = set()
        self.base: dict[str, Tensor] = {}
        self.unmoved: dict[str, Tensor] = {}
        self.dense: Tensor | None = None
        self.rows: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> Hung:
        """Move and cast what is set aside together with the model."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dense = None if self.dense is None else fn(self.dense)
        for aside in (self.base, self.unmoved):
            for key, tensor in aside.items():
                moved = fn(tensor.data)
                if moved.is_meta == tensor.is_meta:
                    tensor.data = moved  # the same object, so that a tied partner stays one
                else:
                    aside[key] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        return self

    def __getitem__(self, name: str) -> Site | Copy:
        return self._modules[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, child: Site | Copy) -> None:
        self._modules[name] = child

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self.active = tuple(other for other in self.active if other != name)
        self.off.discard(name)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def names(self) -> list[str]:
        """The adapters here, in the order in which they came."""
        return list(self._modules)

    def in_use(self) -> list[Any]:
        """The active adapters that are not merged into the weight, in the order of activation."""
        return [self._modules[name] for name in self.names_in_use()]

    def names_in_use(self) -> list[str]:
        """Their names."""
        return [name for name in self.active if name not in self.merged and name not in self.off]


class Adapted(Swapped):
    """Mixed in before the module's own class by `hang`; adds what the active adapters say to its output."""

    lorakin: Hung
    bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        hung = self.lorakin
        sites = hung.in_use()
        if len(sites) == 1 and hung.rows is None and not hung.merged and not torch.compiler.is_compiling():
            stock = getattr(super().forward, "__func__", None) is nn.Linear.forward
            if stock and (whole := sites[0].fused(self, x)) is not None:
                return whole
        base = out = super().forward(*args, **kwargs) if hung.dense is None else F.linear(x, hung.dense, self.bias)
        if hung.rows is not None:
            return hung.rows.adapted(self, x, base)
        for site in sites:
            out = out + site(self, x, base)
        return out


class Replaced(Swapped):
    """Mixed in before a module's own class when an adapter trains the whole module: calls the active copy instead."""

    lorakin: Hung

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.lorakin.rows is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            return self.lorakin.rows.replaced(self, super().forward(*args, **kwargs), x)
        for copy in self.lorakin.in_use():
            return copy.module.forward(*args, **kwargs)  # not its call: the module's own hooks run around this forward
        return super().forward(*args, **kwargs)


class ReplacedSequence(Replaced):
    """`Replaced` for nn.Sequential, whose forward runs over its children: the adapters are not among them."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([child for key, child in self._modules.items() if key != "lorakin" and child is not None])

    def __len__(self) -> int:
        return len(self._modules) - 1


def is_adapted(module: nn.Module) -> bool:
    """Whether adapters hang on this very module."""
    return isinstance(module, Adapted | Replaced)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, also if it is one of a stack of experts, which torch does not know; raises as `get_submodule`."""
    module, parts = model, path.split(".") if path else []
    for n, part in enumerate(parts):
        inner = module._modules.get(part)
        if inner is None and len(parts) == n + 2:
            inner = experts.matrix_of(module, part, parts[-1])
            return model.get_submodule(path) if inner is None else inner
        if inner is None:
            return model.get_submodule(path)
        module = inner
    return module


def hang(module: nn.Module, name: str, child: Site | Copy) -> None:
    """Hang the adapter `name` on `module`; the first one swaps the module's class."""
    if not is_adapted(module):
        swap_class(module, combined(_mixin(module, child), type(module)))
        module.lorakin = Hung()
        if isinstance(module, experts.ExpertMatrix):
            experts.attach(module)
    hung = module.lorakin
    assert isinstance(hung, Hung)
    hung[name] = child


def _mixin(module: nn.Module, child: Site | Copy) -> type[nn.Module]:
    if isinstance(child, Site):
        return Adapted
    return ReplacedSequence if isinstance(module, nn.Sequential) else Replaced


def conflict(module: nn.Module, name: str, child: Site | Copy) -> str | None:
    """Why `child` cannot be hung on `module` as the adapter `name`, or None if it can."""
    if is_adapted(module):
        hung = module.lorakin
        assert isinstance(hung, Hung)
        if isinstance(module, Adapted) is not isinstance(child, Site):
            return "it is in use by another adapter in another way, adapted or trained whole; remove that one first"
        if name in hung:
            return f"it already has an adapter {name!r}, put there through another part of the model"
    called = module.experts if isinstance(module, experts.ExpertMatrix) else module
    if "forward" in vars(called) and "_old_forward" not in vars(called):
        return "its forward was replaced on the instance, so an adapter would never be called"
    return None


def unhang(module: nn.Module, name: str) -> None:
    """Take the adapter `name` off `module`; the last one gives the module its class back."""
    hung = module.lorakin
    assert isinstance(hung, Hung)
    del hung[name]
    if not len(hung):
        del module.lorakin
        swap_class(module, base_class(module))
        if isinstance(module, experts.ExpertMatrix):
            experts.detach(module)


def move_base(module: Any, change: Tensor) -> None:
    """Add `change` (outputs, inputs) to the weight in its own dtype: to a copy, the base's own parameter is set aside."""
    kind = kind_of(module)
    assert kind is not None
    if not module.lorakin.unmoved:
        module.lorakin.unmoved = {"weight": experts.set_aside(module, module.weight)}
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        wide = module.weight.to(torch.promote_types(change.dtype, module.weight.dtype))
        module.weight.copy_(wide + kind.layout(change, module))


def swap_moved(module: Any) -> None:
    """Exchange the weight that was moved with the base's own, and back with the next call. Nothing if none was moved."""
    for key, tensor in module.lorakin.unmoved.items():
        module.lorakin.unmoved[key] = experts.set_aside(module, getattr(module, key))
        setattr(module, key, tensor)
