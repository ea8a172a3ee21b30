"""The class swap: an adapted module becomes a subclass of its own class and gets `.lorakin`.

It keeps its identity, its name, its parameters and their `state_dict` keys. The adapters' tensors
add keys `<path>.lorakin.<adapter>.<tensor>`. When the last adapter goes, it gets its class back.

The path of a forward of an adapted nn.Linear, or of a quantised layer with a `WeightSource`:

1. `ModelHooks` (model_hooks.py), before the model's forward: checks threads and swapped modules.
2. `Adapted.forward` (here): `Attachments.in_use` says which adapters the module uses.
3. With exactly one, `Adapted._fused_output` asks `Branch.change` (branch.py) for the change of the
   weight: a `ScaledPair`, a `Chain` (VeRA), or a `CastPair` where no gradient is needed.
4. `adapted_linear` (kernels/adapted_linear.py) computes the output in one autograd function.

The same sum is computed in three other ways:

- Several adapters, other layers, `torch.compile`: the module's own forward, plus `Branch.forward`.
- Each row of the batch uses another adapter: `MixedBatch.adapted` (mixed_batch.py).
- A forward reads the weight and does not call the module: `changed_weight` (weight_reads.py), and
  for stacks of experts `weight_for_forward` (expert_forward.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family.sharding import whole_shape
from lorakin.inject import expert_forward, experts
from lorakin.inject.attachments import (
    BIAS,
    Adapters,
    Attachments,
    Bias,
    attachments_of,
    attachments_or_none,
)
from lorakin.inject.biases import cast_like_base
from lorakin.inject.branch import Branch, Copy, offloaded_tensors_loaded
from lorakin.inject.callers import first_argument, is_in_forward
from lorakin.inject.class_swap import Swapped, combined, swap_class, unmix
from lorakin.inject.layer_kinds import (
    ExpertLayer,
    QuantisedLayer,
    kind_of,
    overrides_forward,
)
from lorakin.inject.model_hooks import exchanged_message
from lorakin.inject.replaced import Replaced, ReplacedSequence
from lorakin.inject.token_rows import TokenRowsBranch, WithRows
from lorakin.inject.weight_reads import changed_weight
from lorakin.kernels import adapted_linear as kernel


class Adapted(Swapped):
    """Mixed in before the module's own class; adds the active adapters' changes to its output.

    Code that reads the weight in a forward without calling the module gets the changed weight. If
    the adapter in use has a bias, code that reads the bias in a forward gets that, also the
    module's own forward.
    """

    lorakin: Adapters
    bias: Tensor | None

    @staticmethod
    def mixins_after(base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        return (
            (LookupWithAdapters,)
            if issubclass(base, nn.Embedding) and base is not nn.Embedding
            else ()
        )

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
            raise StateError(resized_message(branches[0].path, attached.shape, weight.shape))
        if attached.changes_weight_reads:
            return super().forward(*args, **kwargs)
        x = first_argument(args, kwargs)
        attached.forward_depth += 1
        try:
            if any("_hf_hook" in branch.__dict__ for branch in branches):
                with offloaded_tensors_loaded(branches):
                    return self._adapted_output(attached, branches, x, args, kwargs)
            return self._adapted_output(attached, branches, x, args, kwargs)
        finally:
            attached.forward_depth -= 1

    def _adapted_output(
        self, attached: Attachments, branches: list[Branch], x: Any, args: Any, kwargs: Any
    ) -> Any:
        if len(branches) == 1 and not torch.compiler.is_compiling():
            output = self._fused_output(attached, branches[0], x)
            if output is not None:
                return output

        if attached.merged_weight is None:
            base = out = super().forward(*args, **kwargs)
        else:
            base = out = F.linear(x, attached.merged_weight, self.bias)
        if attached.mixed_batch is not None:
            return attached.mixed_batch.adapted(self, x, base)
        for branch in branches:
            out = out + branch(self, x, base)
        return out

    def _fused_output(self, attached: Attachments, branch: Branch, x: Any) -> Tensor | None:
        """Returns the output of a linear layer with one adapter; None if no kernel applies."""
        if attached.mixed_batch is not None or attached.merged:
            return None
        library_forward = getattr(super().forward, "__func__", None)
        weight = branch.kind.weight_for_kernel(self, library_forward, x, branch.method)
        if weight is None:
            return None

        dropout = branch.method.dropout if branch.training else 0.0
        # A `CastPair` has the weight's dtype; under autocast the products have another.
        is_plain_inference = not (
            dropout or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        )
        change = branch.change(weight, for_inference=is_plain_inference)
        bias = self.bias if attached.has_bias else self._parameters.get(BIAS)
        return kernel.adapted_linear(x, weight, bias, change, dropout, branch.group)

    def __getattr__(self, name: str) -> Any:
        if name not in ("weight", BIAS) or (attached := attachments_or_none(self)) is None:
            return super().__getattr__(name)
        if name == BIAS:
            if (
                attached.has_bias
                and (attached.forward_depth or is_in_forward(1))
                and (owner := attached.owner_of_bias()) is not None
            ):
                return cast_like_base(attached[owner], self)
        elif not attached.forward_depth and attached.in_use() and is_in_forward(1):
            return changed_weight(self, attached)
        return super().__getattr__(name)


class LookupWithAdapters(nn.Embedding):
    """Mixed in after a subclass of nn.Embedding: its `super().forward` looks up changed rows.

    So a scaled embedding scales the change too, and no changed table is formed, not even when
    compiled.
    """

    def forward(self, input: Tensor) -> Tensor:
        attached = attachments_of(self)
        branches = [] if attached.forward_depth else attached.in_use()
        if attached.forward_depth or not (branches or attached.mixed_batch):
            return super().forward(input)
        attached.forward_depth += 1
        try:
            with offloaded_tensors_loaded(branches):
                out: Tensor
                out = base = super().forward(input)
                if attached.mixed_batch is not None:
                    out = attached.mixed_batch.adapted(self, input, base)
                for branch in branches if attached.mixed_batch is None else ():
                    out = out + branch(self, input, base)
                return out
        finally:
            attached.forward_depth -= 1


Child = Branch | Copy | TokenRowsBranch | Bias
"""What an adapter can attach to a module."""


def resized_message(path: str, before: Sequence[int], now: Sequence[int]) -> str:
    """Returns the message for a module that no longer has the size it was adapted at."""
    return (
        f"{path} is now {' × '.join(map(str, now))}, but it was adapted at "
        f"{' × '.join(map(str, before))}: something, such as resize_token_embeddings, changed it "
        "since. Resize a model before you adapt it: remove the adapter, resize, and adapt again"
    )


def is_adapted(module: nn.Module) -> bool:
    """Returns whether adapters are attached to this very module."""
    return isinstance(module, Adapted | Replaced | WithRows)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module at a path, also one of a stack of experts, which torch does not know.

    Raises:
        AttributeError: there is none, as from `get_submodule`.
    """
    module, parts = model, path.split(".") if path else []
    for n, part in enumerate(parts):
        inner = module._modules.get(part)
        if inner is None and len(parts) == n + 2:
            # `….experts.down_proj.3`: a parameter, and the number of one of its matrices
            inner = (
                experts.find_matrix(module, part, parts[-1]) if kind_of(module) is None else None
            )
            return model.get_submodule(path) if inner is None else inner
        if inner is None:
            return model.get_submodule(path)
        module = inner
    return module


def attachments_at(model: nn.Module, path: str) -> Attachments:
    """Returns the attachments of the module at `path`.

    Raises:
        StateError: another module was put in its place.
    """
    module = module_at(model, path)
    if not is_adapted(module):
        raise StateError(exchanged_message(path))
    return attachments_of(module)


def attach(module: nn.Module, name: str, child: Child) -> None:
    """Attaches the adapter `name` to `module`; the first one swaps the module's class."""
    if not is_adapted(module):
        swap_class(module, combined(_mixin(module, child), type(module)))
        attached = Attachments()
        attached.changes_weight_reads = isinstance(child, Bias)
        module.lorakin = attached.adapters
        if isinstance(child, TokenRowsBranch):
            kind = kind_of(module)
            assert kind is not None
            attached.changes_weight_reads = overrides_forward(module, kind)
            attached.shape = whole_shape(module.weight)  # type: ignore[arg-type]
        if isinstance(module, experts.ExpertMatrix):
            expert_forward.attach(module)
    attached = attachments_of(module)
    if isinstance(child, Branch) and not any(
        isinstance(other, Branch) for other in attached.values()
    ):
        attached.changes_weight_reads = overrides_forward(module, child.kind)
        weight = module._parameters.get("weight")
        if weight is not None and child.kind not in (QuantisedLayer, ExpertLayer):
            attached.shape = whole_shape(weight)
    attached[name] = child


def _mixin(module: nn.Module, child: Child) -> type[nn.Module]:
    if isinstance(child, TokenRowsBranch):
        return WithRows
    if not isinstance(child, Copy):
        return Adapted
    return ReplacedSequence if isinstance(module, nn.Sequential) else Replaced


def refusal_to_attach(module: nn.Module, name: str, child: Child) -> str | None:
    """Returns why `child` cannot be attached to `module` as the adapter `name`; None if it can."""
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
    called = module.owner if isinstance(module, experts.ExpertMatrix) else module
    if "forward" in vars(called) and "_old_forward" not in vars(called):
        return "its forward was replaced on the instance, so it would never call an adapter"
    return None


def detach(module: nn.Module, name: str) -> None:
    """Detaches the adapter `name` from `module`; after the last one it gets its class back."""
    attached = attachments_of(module)
    del attached[name]
    if not len(attached):
        del module.lorakin
        unmix(module, Adapted, Replaced, ReplacedSequence, WithRows)
        if isinstance(module, experts.ExpertMatrix):
            expert_forward.detach(module)


def add_to_weight_copy(module: Any, change: Tensor) -> None:
    """Adds `change` (outputs, inputs) to a copy of the weight, in its dtype.

    The base's parameter is kept in `Attachments.base_before_move`.
    """
    kind = kind_of(module)
    assert kind is not None
    attached = attachments_of(module)
    if not attached.base_before_move:
        attached.base_before_move = {"weight": experts.kept_weight(module, module.weight)}
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        wide = module.weight.to(torch.promote_types(change.dtype, module.weight.dtype))
        module.weight.copy_(wide + kind.layout(change, module))


def exchange_moved_weight(module: Any) -> None:
    """Exchanges the moved weight with the base's, and back with the next call."""
    kept = attachments_of(module).base_before_move
    for key, tensor in kept.items():
        kept[key] = experts.kept_weight(module, getattr(module, key))
        setattr(module, key, tensor)
