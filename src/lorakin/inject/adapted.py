"""The class swap: an adapted module becomes a subclass of its own class, with adapters hung on it as `.lorakin`.

The module keeps its identity, its name, its parameters and their `state_dict` keys; the adapters' tensors add keys of
the form `<path>.lorakin.<adapter>.<tensor>`. When the last adapter goes, the module gets its class back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family.pair import whole_shape
from lorakin.inject import experts
from lorakin.inject.attachments import BIAS, KEY, Adapters, Bias, Hung, hung_on, hung_or_none
from lorakin.inject.biases import as_the_bases
from lorakin.inject.branch import Copy, Site, brought
from lorakin.inject.callers import is_in_forward
from lorakin.inject.class_swap import Swapped, combined, swap_class, unmix
from lorakin.inject.layers import ExpertLayer, QuantisedLayer, has_own_forward, kind_of
from lorakin.inject.rows import Rows, WithRows
from lorakin.inject.weight_reads import changed_weight


class Adapted(Swapped):
    """Mixed in before the module's own class by `hang`; adds what the active adapters say to its output.

    Who reads its weight in a forward, without calling the module, gets the changed weight. Who reads
    its bias in a forward, the module's own too, gets that of the adapter in use, if it has one.
    """

    lorakin: Adapters
    bias: Tensor | None

    @staticmethod
    def beneath(base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        return (Looked,) if issubclass(base, nn.Embedding) and base is not nn.Embedding else ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hung = hung_on(self)
        sites = hung.in_use()
        weight = self._parameters.get("weight")
        if sites and hung.shape is not None and weight is not None and weight.shape != hung.shape:
            raise StateError(resized(sites[0].path, hung.shape, weight.shape))
        if hung.by_weight:
            return super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        hung.inside += 1
        try:
            if any("_hf_hook" in site.__dict__ for site in sites):
                with brought(sites):
                    return self._changed(hung, sites, x, args, kwargs)
            return self._changed(hung, sites, x, args, kwargs)
        finally:
            hung.inside -= 1

    def _changed(self, hung: Hung, sites: list[Site], x: Any, args: Any, kwargs: Any) -> Any:
        own_forward = super().forward
        if (
            len(sites) == 1
            and hung.rows is None
            and not hung.merged
            and not torch.compiler.is_compiling()
        ):
            stock = getattr(own_forward, "__func__", None) is nn.Linear.forward
            if stock and (whole := sites[0].fused(self, x)) is not None:
                return whole
        base = out = (
            own_forward(*args, **kwargs)
            if hung.dense is None
            else F.linear(x, hung.dense, self.bias)
        )
        if hung.rows is not None:
            return hung.rows.adapted(self, x, base)
        for site in sites:
            out = out + site(self, x, base)
        return out

    def __getattr__(self, name: str) -> Any:
        if name not in ("weight", BIAS) or (hung := hung_or_none(self)) is None:
            return super().__getattr__(name)
        if name == BIAS:
            if (
                hung.biased
                and (hung.inside or is_in_forward(1))
                and (owner := hung.owner_of_bias()) is not None
            ):
                return as_the_bases(hung[owner], self)
        elif not hung.inside and hung.in_use() and is_in_forward(1):
            return changed_weight(self, hung)
        return super().__getattr__(name)


class Looked(nn.Embedding):
    """nn.Embedding where a subclass with a forward of its own calls it: what is looked up is the changed rows.

    So a scaled embedding scales the change with them, and no changed table is made, also by a compiler.
    """

    def forward(self, input: Tensor) -> Tensor:
        hung = hung_on(self)
        sites = [] if hung.inside else hung.in_use()
        if hung.inside or not (sites or hung.rows):
            return super().forward(input)
        hung.inside += 1
        try:
            with brought(sites):
                out: Tensor
                out = base = super().forward(input)
                if hung.rows is not None:
                    out = hung.rows.adapted(self, input, base)
                for site in sites if hung.rows is None else ():
                    out = out + site(self, input, base)
                return out
        finally:
            hung.inside -= 1


class Replaced(Swapped):
    """Mixed in before a module's own class when an adapter trains the whole module: its copy is used instead.

    Also by who reads its tensors and parts in a forward, or calls another of its methods.
    """

    lorakin: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hung = hung_on(self)
        if hung.rows is None:
            for copy in hung.in_use():
                return copy.module.forward(
                    *args, **kwargs
                )  # not its call: the module's own hooks run around this forward
        hung.inside += 1
        try:
            out = super().forward(*args, **kwargs)
        finally:
            hung.inside -= 1
        if hung.rows is None:
            return out
        return hung.rows.replaced(self, out, args[0] if args else next(iter(kwargs.values())))

    def __getattr__(self, name: str) -> Any:
        if name != KEY and (copy := _copy_in_use(self, 3)) is not None:
            return getattr(copy, name)
        return super().__getattr__(name)


class ReplacedSequence(Replaced):
    """`Replaced` for nn.Sequential, whose parts are its children: the adapters are not among them."""

    def _parts(self) -> list[nn.Module]:
        here: nn.Module = _copy_in_use(self, 4) or self
        return [child for key, child in here._modules.items() if key != KEY and child is not None]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())

    def __getitem__(self, index: Any) -> Any:
        parts = self._parts()[index]
        return nn.Sequential(*parts) if isinstance(index, slice) else parts


def _copy_in_use(module: Replaced, depth: int) -> nn.Module | None:
    """The copy that answers for `module` to the function `depth` calls above this, or None."""
    hung = hung_or_none(module)
    if hung is None or hung.inside or not (copies := hung.in_use()) or not is_in_forward(depth - 1):
        return None
    if hung.rows is not None:
        raise StateError(
            f"a {type(module).__name__} that is trained whole is read without being called, so it cannot be in a mixed batch"
        )
    own: nn.Module = copies[0].module
    return own


Child = Site | Copy | Rows | Bias
"""What hangs on a module."""


def resized(path: str, before: Sequence[int], now: Sequence[int]) -> str:
    """What to say of a module that is no longer as large as its adapter."""
    return (
        f"{path} is now {' x '.join(map(str, now))}, but it was adapted at {' x '.join(map(str, before))}: "
        "something, such as resize_token_embeddings, changed it since. Resize a model before it is adapted; "
        "here, remove the adapter, resize, and adapt again"
    )


def is_adapted(module: nn.Module) -> bool:
    """Whether adapters hang on this very module."""
    return isinstance(module, Adapted | Replaced | WithRows)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, also if it is one of a stack of experts, which torch does not know; raises as `get_submodule`."""
    module, parts = model, path.split(".") if path else []
    for n, part in enumerate(parts):
        inner = module._modules.get(part)
        if inner is None and len(parts) == n + 2:
            inner = experts.matrix_of(module, part, parts[-1]) if kind_of(module) is None else None
            return model.get_submodule(path) if inner is None else inner
        if inner is None:
            return model.get_submodule(path)
        module = inner
    return module


def hang(module: nn.Module, name: str, child: Child) -> None:
    """Hang the adapter `name` on `module`; the first one swaps the module's class."""
    if not is_adapted(module):
        swap_class(module, combined(_mixin(module, child), type(module)))
        hung = Hung()
        hung.by_weight = isinstance(child, Bias)
        module.lorakin = hung.adapters
        if isinstance(child, Rows):
            kind = kind_of(module)
            assert kind is not None
            hung.by_weight = has_own_forward(module, kind)
            hung.shape = whole_shape(module.weight)  # type: ignore[arg-type]
        if isinstance(module, experts.ExpertMatrix):
            experts.attach(module)
    hung = hung_on(module)
    if isinstance(child, Site) and not any(isinstance(other, Site) for other in hung.values()):
        hung.by_weight = has_own_forward(module, child.layer)
        weight = module._parameters.get("weight")
        if weight is not None and child.layer not in (QuantisedLayer, ExpertLayer):
            hung.shape = whole_shape(weight)
    hung[name] = child


def _mixin(module: nn.Module, child: Child) -> type[nn.Module]:
    if isinstance(child, Rows):
        return WithRows
    if not isinstance(child, Copy):
        return Adapted
    return ReplacedSequence if isinstance(module, nn.Sequential) else Replaced


def conflict(module: nn.Module, name: str, child: Child) -> str | None:
    """Why `child` cannot be hung on `module` as the adapter `name`, or None if it can."""
    if is_adapted(module):
        hung = hung_on(module)
        if not isinstance(module, _mixin(module, child)):
            return (
                "it is in use by another adapter in another way: adapted, trained whole, or some of its rows "
                "trained; remove that one first"
            )
        if name in hung:
            return (
                f"it already has an adapter {name!r}, put there through another part of the model"
            )
    called = module.experts if isinstance(module, experts.ExpertMatrix) else module
    if "forward" in vars(called) and "_old_forward" not in vars(called):
        return "its forward was replaced on the instance, so an adapter would never be called"
    return None


def unhang(module: nn.Module, name: str) -> None:
    """Take the adapter `name` off `module`; the last one gives the module its class back."""
    hung = hung_on(module)
    del hung[name]
    if not len(hung):
        del module.lorakin
        unmix(module, Adapted, Replaced, ReplacedSequence, WithRows)
        if isinstance(module, experts.ExpertMatrix):
            experts.detach(module)


def move_base(module: Any, change: Tensor) -> None:
    """Add `change` (outputs, inputs) to the weight in its own dtype: to a copy, the base's own parameter is set aside."""
    kind = kind_of(module)
    assert kind is not None
    hung = hung_on(module)
    if not hung.unmoved:
        hung.unmoved = {"weight": experts.set_aside(module, module.weight)}
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        wide = module.weight.to(torch.promote_types(change.dtype, module.weight.dtype))
        module.weight.copy_(wide + kind.layout(change, module))


def swap_moved(module: Any) -> None:
    """Exchange the weight that was moved with the base's own, and back with the next call. Nothing if none was moved."""
    unmoved = hung_on(module).unmoved
    for key, tensor in unmoved.items():
        unmoved[key] = experts.set_aside(module, getattr(module, key))
        setattr(module, key, tensor)
