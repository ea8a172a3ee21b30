"""Norms, gated activations and the loss of Llama-like models in less memory, the adapters aside. Opt in with `lorakin.fuse`.

A norm keeps its input and one number a token, a gated activation its two inputs; what they give is made again for those
layers that need it in backward (`Recipe`). The head's logits are not made at all where nothing but a cross-entropy asks for
them (`Deferred`). Values are those of the modules they replace, to the bit where those are transformers' own.

As everywhere in this room the module changes its class and keeps its name, parameters and state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError
from lorakin.inject.adapted import is_adapted
from lorakin.inject.class_swap import Swapped, base_class, combined
from lorakin.inject.eval_mode import in_mode
from lorakin.kernels.autograd import PLAIN, backward_once, plainly
from lorakin.kernels.lazy_logits import Deferred
from lorakin.kernels.rebuilding import Rebuilding


class Norm(torch.autograd.Function):
    """w · (x · scale) over the last dimension, in float32 and rounded to the dtype of x before w, as Llama's.

    `scale` is `scale_of(x)`; the gradient knows that it depends on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        return normed(x, scale, weight)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        direction = x.float() * scale  # not x · scale: mixed dtypes go a slow way
        for_weight = (
            (grad * direction.to(x.dtype)).flatten(0, -2).sum(0)
            if ctx.needs_input_grad[1]
            else None
        )
        wide = (grad * weight).float()
        along = (wide * direction).mean(-1, keepdim=True)
        for_x = (
            wide.sub_(direction.mul_(along)).mul_(scale).to(x.dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        return for_x, for_weight, None


def scale_of(x: Tensor, epsilon: Any) -> Tensor:
    """1 / √(mean x² + ε) over the last dimension (…, 1), float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)


def normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """What `Norm` gives, from the scale of each token."""
    return weight * (x.float() * scale).to(x.dtype)


class Gate(torch.autograd.Function):
    """silu(gate) · up, of which both inputs are kept and nothing else."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """What `Gate` gives."""
    return F.silu(gate).mul_(up)


class LightNorm(Swapped):
    """Mixed in before a norm's own class."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if not _lightly(x, weight):
            return super().forward(x)  # type: ignore[no-any-return]
        scale = scale_of(x.detach(), self.variance_epsilon)
        out: Tensor = Norm.apply(x, weight, scale)  # type: ignore[no-untyped-call]
        return Rebuilding.put(out, normed, (x, scale, weight))


class LightGate(Swapped):
    """Mixed in before the class of a gated MLP."""

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        gate, up = parts.gate_proj(x), parts.up_proj(x)
        if not _lightly(gate, up):
            return parts.down_proj(parts.act_fn(gate) * up)  # type: ignore[no-any-return]
        hidden: Tensor = Gate.apply(gate, up)  # type: ignore[no-untyped-call]
        return parts.down_proj(Rebuilding.put(hidden, gated, (gate, up)))  # type: ignore[no-any-return]


class LightHead(Swapped):
    """Mixed in before the class of a head: in train mode its logits are made when something asks for them."""

    def forward(self, x: Tensor) -> Tensor:
        head: Any = self
        deferrable = (
            self.training
            and head.bias is None
            and not head.weight.requires_grad
            and _lightly(x, head.weight)
        )
        if not deferrable or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # type: ignore[no-any-return]
        return Deferred.of(x, head.weight)


LIGHT = (LightNorm, LightGate, LightHead)


def _lightly(x: Any, other: Tensor) -> bool:
    """Whether something is to be kept for a backward, of tensors that the functions here know."""
    if type(x) not in PLAIN or type(other) not in PLAIN or not torch.is_grad_enabled():
        return False
    return x.dtype == other.dtype and (x.requires_grad or other.requires_grad) and plainly()


def fuse(model: nn.Module) -> int:
    """Make the norms, gated activations and head of `model` light; returns how many modules that were.

    Raises:
        SettingError: none of them is of a kind that this knows.
    """
    found: dict[nn.Module, type[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, LIGHT) or is_adapted(
            module
        ):  # of one trained whole, the adapter's copy is a module too
            continue
        if mixin := next((mixin for mixin, fits in FITS.items() if fits(module)), None):
            found[module] = mixin
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is nn.Linear:
        found[head] = LightHead
    if not found and not any(isinstance(module, LIGHT) for module in model.modules()):
        raise SettingError(
            f"fuse found nothing in a {type(model).__name__} that it knows: Llama's RMSNorm and gated SiLU, and a linear head"
        )
    for module, mixin in found.items():
        module.__class__ = combined(mixin, type(module))
    return len(found)


def unfuse(model: nn.Module) -> None:
    """Give the modules that `fuse` changed their own classes back.

    Raises:
        StateError: one of them was adapted, or is trained whole by an adapter, since.
    """
    light: dict[str, nn.Module] = {
        path: module for path, module in model.named_modules() if isinstance(module, LIGHT)
    }
    if taken := [path for path, module in light.items() if type(module).__bases__[0] not in LIGHT]:
        raise StateError(f"{taken[0]} was fused and then adapted; remove the adapter before unfuse")
    for module in light.values():
        module.__class__ = base_class(module)


def _can_be_probed(module: Any) -> bool:
    """Whether the module's weight is there, a plain tensor with values."""
    weight = vars(module)["_parameters"].get("weight")
    return type(weight) in PLAIN and not weight.is_meta and "_hf_hook" not in vars(module)


@torch.no_grad()
def _is_norm(module: Any) -> bool:
    named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    if not named or not _can_be_probed(module):
        return False
    weight = module.weight
    probe = (
        torch.linspace(-3, 2, 2 * len(weight), device=weight.device).view(2, -1).to(weight.dtype)
    )
    return torch.equal(
        module(probe), normed(probe, scale_of(probe, module.variance_epsilon), weight)
    )


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    children = dict(module.named_children())
    named = {"gate_proj", "up_proj", "down_proj"} <= children.keys()
    silu = type(children.get("act_fn")).__name__ in ("SiLU", "SiLUActivation")
    if not (named and silu and len(children) == 4 and type(module).__name__.endswith("MLP")):
        return False
    if "_hf_hook" in vars(module) or not _can_be_probed(module.gate_proj):
        return False
    weight = module.gate_proj.weight
    probe = torch.linspace(-1, 1, module.gate_proj.in_features, device=weight.device)
    probe = torch.stack([probe, 1000 * probe.flip(0)]).to(
        weight.dtype
    )  # the second meets limits, if there are any
    with in_mode(module, training=False):
        expected = module.down_proj(module.act_fn(module.gate_proj(probe)) * module.up_proj(probe))
        return torch.allclose(module(probe), expected, rtol=0, atol=0, equal_nan=True)


FITS: dict[type[nn.Module], Callable[[nn.Module], bool]] = {
    LightNorm: _is_norm,
    LightGate: _is_gated,
}
