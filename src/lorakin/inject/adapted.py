"""The class swap: an adapted module becomes a subclass of its own class and gets `.lorakin`.

It keeps its identity, its name, its parameters and their `state_dict` keys. The adapters' tensors
add keys `<path>.lorakin.<adapter>.<tensor>`. When the last adapter goes, it gets its class back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family.pair import ScaledPair
from lorakin.family.sharding import whole_shape
from lorakin.inject import expert_forward, experts
from lorakin.inject.attachments import (
    BIAS,
    KEY,
    Adapters,
    Attachments,
    Bias,
    attachments_of,
    attachments_or_none,
)
from lorakin.inject.biases import as_the_bases
from lorakin.inject.branch import Branch, Copy, brought
from lorakin.inject.callers import is_in_forward
from lorakin.inject.class_swap import Swapped, combined, swap_class, unmix
from lorakin.inject.layer_kinds import (
    ExpertLayer,
    LinearLayer,
    QuantisedLayer,
    kind_of,
    overrides_forward,
)
from lorakin.inject.token_rows import TokenRowsBranch, WithRows
from lorakin.inject.weight_reads import changed_weight
from lorakin.kernels import adapted_linear as kernel


class Adapted(Swapped):
    """Mixed in before the module's own class; adds the active adapters' changes to its output.

    Code that reads the weight in a forward without calling the module gets the changed weight. Code
    that reads the bias in a forward, the module's own included, gets the bias of the adapter in use
    if that has one.
    """

    lorakin: Adapters
    bias: Tensor | None

    @staticmethod
    def beneath(base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        return (Looked,) if issubclass(base, nn.Embedding) and base is not nn.Embedding else ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attached = attachments_of(self)
        branches = attached.in_use()
        weight = self._parameters.get("weight")
        if (
            branches
            and attached.shape is not None
            and weight is not None
            and weight.shape != attached.shape
        ):
            raise StateError(resized(branches[0].path, attached.shape, weight.shape))
        if attached.by_weight:
            return super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        attached.inside += 1
        try:
            if any("_hf_hook" in branch.__dict__ for branch in branches):
                with brought(branches):
                    return self._changed(attached, branches, x, args, kwargs)
            return self._changed(attached, branches, x, args, kwargs)
        finally:
            attached.inside -= 1

    def _changed(
        self, attached: Attachments, branches: list[Branch], x: Any, args: Any, kwargs: Any
    ) -> Any:
        if len(branches) == 1 and not torch.compiler.is_compiling():
            whole = self._in_one_pass(attached, branches[0], x)
            if whole is not None:
                return whole

        if attached.dense is None:
            base = out = super().forward(*args, **kwargs)
        else:
            base = out = F.linear(x, attached.dense, self.bias)
        if attached.mixed_batch is not None:
            return attached.mixed_batch.adapted(self, x, base)
        for branch in branches:
            out = out + branch(self, x, base)
        return out

    def _in_one_pass(self, attached: Attachments, branch: Branch, x: Any) -> Tensor | None:
        """The output of an nn.Linear with one adapter; None where the kernel does not apply.

        Step 1 of the path that `kernels/adapted_linear.py` describes.
        """
        weight = self._parameters.get("weight")
        if branch.layer is not LinearLayer or attached.mixed_batch is not None or attached.merged:
            return None
        library_forward = getattr(super().forward, "__func__", None)
        if library_forward is not nn.Linear.forward or not kernel.applies(x, weight):
            return None
        assert weight is not None

        dropout = branch.method.dropout if branch.training else 0.0
        needs_backward = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        change = branch.change(weight, ready=not (dropout or needs_backward))
        if dropout and isinstance(change, ScaledPair) and change.pair.gain is not None:
            return None  # the gain acts on W0 x̃ too, which is another product with the weight
        bias = self.bias if attached.biased else self._parameters.get(BIAS)
        return kernel.adapted_linear(x, weight, bias, change, dropout, branch.siblings)

    def __getattr__(self, name: str) -> Any:
        if name not in ("weight", BIAS) or (attached := attachments_or_none(self)) is None:
            return super().__getattr__(name)
        if name == BIAS:
            if (
                attached.biased
                and (attached.inside or is_in_forward(1))
                and (owner := attached.owner_of_bias()) is not None
            ):
                return as_the_bases(attached[owner], self)
        elif not attached.inside and attached.in_use() and is_in_forward(1):
            return changed_weight(self, attached)
        return super().__getattr__(name)


class Looked(nn.Embedding):
    """nn.Embedding as called by a subclass with its own forward: it looks up the changed rows.

    So a scaled embedding scales the change too, and not even a compiler makes a changed table.
    """

    def forward(self, input: Tensor) -> Tensor:
        attached = attachments_of(self)
        branches = [] if attached.inside else attached.in_use()
        if attached.inside or not (branches or attached.mixed_batch):
            return super().forward(input)
        attached.inside += 1
        try:
            with brought(branches):
                out: Tensor
                out = base = super().forward(input)
                if attached.mixed_batch is not None:
                    out = attached.mixed_batch.adapted(self, input, base)
                for branch in branches if attached.mixed_batch is None else ():
                    out = out + branch(self, input, base)
                return out
        finally:
            attached.inside -= 1


class Replaced(Swapped):
    """Mixed in before the class of a module that an adapter trains whole: the copy is used instead.

    That holds also for code in a forward that reads the module's tensors and parts, or calls
    another of its methods.
    """

    lorakin: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attached = attachments_of(self)
        if attached.mixed_batch is None:
            for copy in attached.in_use():
                # Not `copy.module(…)`: the module's own hooks already run around this forward.
                return copy.module.forward(*args, **kwargs)
        attached.inside += 1
        try:
            out = super().forward(*args, **kwargs)
        finally:
            attached.inside -= 1
        if attached.mixed_batch is None:
            return out
        return attached.mixed_batch.replaced(
            self, out, args[0] if args else next(iter(kwargs.values()))
        )

    def __getattr__(self, name: str) -> Any:
        if name != KEY and (copy := _copy_in_use(self, 3)) is not None:
            return getattr(copy, name)
        return super().__getattr__(name)


class ReplacedSequence(Replaced):
    """`Replaced` for nn.Sequential: its parts are its children, without the adapters."""

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
    """The copy that answers for `module` to the caller `depth` frames up, or None."""
    attached = attachments_or_none(module)
    if (
        attached is None
        or attached.inside
        or not (copies := attached.in_use())
        or not is_in_forward(depth - 1)
    ):
        return None
    if attached.mixed_batch is not None:
        raise StateError(
            f"a {type(module).__name__} that is trained whole is read without being called, so it "
            "cannot be in a mixed batch"
        )
    own: nn.Module = copies[0].module
    return own


Child = Branch | Copy | TokenRowsBranch | Bias
"""What hangs on a module."""


def resized(path: str, before: Sequence[int], now: Sequence[int]) -> str:
    """The message for a module that no longer has the size it was adapted at."""
    return (
        f"{path} is now {' x '.join(map(str, now))}, but it was adapted at "
        f"{' x '.join(map(str, before))}: something, such as resize_token_embeddings, changed it "
        "since. Resize a model before you adapt it: remove the adapter, resize, and adapt again"
    )


def is_adapted(module: nn.Module) -> bool:
    """Whether adapters hang on this very module."""
    return isinstance(module, Adapted | Replaced | WithRows)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, also one of a stack of experts, which torch does not know.

    Raises:
        AttributeError: there is none, as from `get_submodule`.
    """
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


def attach(module: nn.Module, name: str, child: Child) -> None:
    """Hang the adapter `name` on `module`; the first one swaps the module's class."""
    if not is_adapted(module):
        swap_class(module, combined(_mixin(module, child), type(module)))
        attached = Attachments()
        attached.by_weight = isinstance(child, Bias)
        module.lorakin = attached.adapters
        if isinstance(child, TokenRowsBranch):
            kind = kind_of(module)
            assert kind is not None
            attached.by_weight = overrides_forward(module, kind)
            attached.shape = whole_shape(module.weight)  # type: ignore[arg-type]
        if isinstance(module, experts.ExpertMatrix):
            expert_forward.attach(module)
    attached = attachments_of(module)
    if isinstance(child, Branch) and not any(
        isinstance(other, Branch) for other in attached.values()
    ):
        attached.by_weight = overrides_forward(module, child.layer)
        weight = module._parameters.get("weight")
        if weight is not None and child.layer not in (QuantisedLayer, ExpertLayer):
            attached.shape = whole_shape(weight)
    attached[name] = child


def _mixin(module: nn.Module, child: Child) -> type[nn.Module]:
    if isinstance(child, TokenRowsBranch):
        return WithRows
    if not isinstance(child, Copy):
        return Adapted
    return ReplacedSequence if isinstance(module, nn.Sequential) else Replaced


def conflict(module: nn.Module, name: str, child: Child) -> str | None:
    """Why `child` cannot hang on `module` as the adapter `name`; None if it can."""
    if is_adapted(module):
        attached = attachments_of(module)
        if not isinstance(module, _mixin(module, child)):
            return (
                "another adapter uses it in another way (as adapted, as trained whole, or with "
                "trained rows); remove that adapter first"
            )
        if name in attached:
            return (
                f"it already has an adapter {name!r}, put there through another part of the model"
            )
    called = module.experts if isinstance(module, experts.ExpertMatrix) else module
    if "forward" in vars(called) and "_old_forward" not in vars(called):
        return "its forward was replaced on the instance, so it would never call an adapter"
    return None


def detach(module: nn.Module, name: str) -> None:
    """Take the adapter `name` off `module`; after the last one the module gets its class back."""
    attached = attachments_of(module)
    del attached[name]
    if not len(attached):
        del module.lorakin
        unmix(module, Adapted, Replaced, ReplacedSequence, WithRows)
        if isinstance(module, experts.ExpertMatrix):
            expert_forward.detach(module)


def move_base(module: Any, change: Tensor) -> None:
    """Add `change` (outputs, inputs) to a copy of the weight, in its own dtype.

    The base's own parameter is set aside.
    """
    kind = kind_of(module)
    assert kind is not None
    attached = attachments_of(module)
    if not attached.unmoved:
        attached.unmoved = {"weight": experts.set_aside(module, module.weight)}
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        wide = module.weight.to(torch.promote_types(change.dtype, module.weight.dtype))
        module.weight.copy_(wide + kind.layout(change, module))


def swap_moved(module: Any) -> None:
    """Exchange the moved weight with the base's own, and back with the next call."""
    unmoved = attachments_of(module).unmoved
    for key, tensor in unmoved.items():
        unmoved[key] = experts.set_aside(module, getattr(module, key))
        setattr(module, key, tensor)
