"""Norms, gated activations and the loss of Llama-like models, in less memory. See `lorakin.fuse`.

A norm keeps its input and one number per token, a gated activation its two inputs. Layers that need
their outputs in the backward compute them again (kernels/recomputation.py). The head's logits are
not computed where only a cross-entropy asks for them (kernels/lazy_logits.py). On a CPU values are
those of the replaced modules, to the bit where these are transformers' own.

On a GPU the same functions launch Liger's kernels and ours (kernels/liger_operators.py), and the
rotary embedding of the attentions does too. What runs is decided by the tensors of each call: a
model may be fused first and moved then.

As with adapters, the module's class changes; its name, parameters and state dict stay.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError
from lorakin.inject.adapted import is_adapted
from lorakin.inject.class_swap import Swapped, base_class, combined, swap_class
from lorakin.inject.module_mode import in_mode
from lorakin.kernels.autograd import PLAIN_TYPES, runs_eagerly
from lorakin.kernels.gate import gated_silu
from lorakin.kernels.lazy_logits import LazyLogits
from lorakin.kernels.norm import normed, rms_norm, scale_of
from lorakin.kernels.rotary import in_place_of, plainly_rotated


class LightNorm(Swapped):
    """Mixed in before a norm's own class."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if not _saves_memory(x, weight):
            return super().forward(x)  # type: ignore[no-any-return]
        return rms_norm(x, weight, self.variance_epsilon)  # type: ignore[arg-type]


class LightGate(Swapped):
    """Mixed in before the class of a gated MLP."""

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        gate, up = parts.gate_proj(x), parts.up_proj(x)
        if not _saves_memory(gate, up):
            return parts.down_proj(parts.act_fn(gate) * up)  # type: ignore[no-any-return]
        return parts.down_proj(gated_silu(gate, up))  # type: ignore[no-any-return]


class LightHead(Swapped):
    """Mixed in before the class of a head: in train mode it returns `LazyLogits`."""

    def forward(self, x: Tensor) -> Tensor:
        head: Any = self
        is_frozen = head.bias is None and not head.weight.requires_grad
        if not (self.training and is_frozen and _saves_memory(x, head.weight)):
            return super().forward(x)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # type: ignore[no-any-return]
        return LazyLogits.of(x, head.weight)


class LightAttention(Swapped):
    """Mixed in before the class of an attention: on a GPU it rotates by kernels of ours.

    The class's own forward runs, with another `apply_rotary_pos_emb` among its globals.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = super().forward
        if not runs_eagerly():
            return own(*args, **kwargs)
        function = own.__func__
        names = dict(function.__globals__)
        names[ROTARY] = in_place_of(names[ROTARY])
        rotating = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        rotating.__kwdefaults__ = function.__kwdefaults__
        return rotating(self, *args, **kwargs)


ROTARY = "apply_rotary_pos_emb"
"""transformers' function, one for each kind of model."""
MIXINS = (LightNorm, LightGate, LightAttention, LightHead)


def _saves_memory(x: Any, weight: Tensor) -> bool:
    """Returns whether the functions here apply, and there is a backward that they help."""
    if type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES:
        return False
    has_backward = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.dtype == weight.dtype and has_backward and runs_eagerly()


def fuse(model: nn.Module) -> int:
    """Replaces norms, gated activations, attentions and head by versions that keep less memory.

    Attentions only change on a GPU, where queries and keys are rotated by one kernel each. There
    Liger's kernels are used, if installed (`pip install 'lorakin[gpu]'`).

    >>> import lorakin as lk, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...     num_attention_heads=1)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> lk.fuse(model)  # three norms, a gated MLP, an attention and the head
    6
    >>> lk.unfuse(model)

    Returns:
        how many modules were replaced.

    Raises:
        SettingError: the model has none of the kinds that this knows.
    """
    mixin_of: dict[nn.Module, type[nn.Module]] = {}
    for module in model.modules():
        # In the place of a module that is trained whole, the adapter's copy is replaced.
        if isinstance(module, MIXINS) or is_adapted(module):
            continue
        if mixin := next((mixin for mixin, fits in FITS.items() if fits(module)), None):
            mixin_of[module] = mixin
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is nn.Linear:
        mixin_of[head] = LightHead
    # An attention alone does not count: on a CPU it does what it did.
    kinds = set(mixin_of.values()) - {LightAttention}
    if not kinds and not any(isinstance(module, MIXINS) for module in model.modules()):
        raise SettingError(
            f"fuse found nothing in a {type(model).__name__} that it can replace; it knows Llama's "
            "RMSNorm and gated SiLU, and a linear head"
        )
    for module, mixin in mixin_of.items():
        swap_class(module, combined(mixin, type(module)))
    return len(mixin_of)


def unfuse(model: nn.Module) -> None:
    """Gives the modules that `fuse` changed their own classes back.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> lk.unfuse(model)  # there is nothing to do

    Raises:
        StateError: an adapter was put on one of them since.
    """
    light: dict[str, nn.Module] = {
        path: module for path, module in model.named_modules() if isinstance(module, MIXINS)
    }
    if adapted := [
        path for path, module in light.items() if type(module).__bases__[0] not in MIXINS
    ]:
        raise StateError(
            f"{adapted[0]} was fused and then adapted; remove the adapter before unfuse"
        )
    for module in light.values():
        swap_class(module, base_class(module))


def _can_be_probed(module: Any) -> bool:
    """Returns whether the module's weight is here, as a plain tensor with numbers."""
    weight = vars(module)["_parameters"].get("weight")
    return type(weight) in PLAIN_TYPES and not weight.is_meta and "_hf_hook" not in vars(module)


@torch.no_grad()
def _is_norm(module: Any) -> bool:
    """Returns whether the module is named as Llama's norm and computes the same."""
    is_named = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    if not is_named or not _can_be_probed(module):
        return False
    weight = module.weight
    probe = torch.linspace(-3, 2, 2 * len(weight), device=weight.device)
    probe = probe.view(2, -1).to(weight.dtype)
    expected = normed(probe, scale_of(probe, module.variance_epsilon), weight)
    return torch.equal(module(probe), expected)


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Returns whether the module is named as Llama's MLP and computes the same."""
    children = dict(module.named_children())
    has_parts = {"gate_proj", "up_proj", "down_proj"} <= children.keys()
    has_silu = type(children.get("act_fn")).__name__ in ("SiLU", "SiLUActivation")
    if not (
        has_parts and has_silu and len(children) == 4 and type(module).__name__.endswith("MLP")
    ):
        return False
    if "_hf_hook" in vars(module) or not _can_be_probed(module.gate_proj):
        return False
    weight = module.gate_proj.weight
    probe = torch.linspace(-1, 1, module.gate_proj.in_features, device=weight.device)
    # The second row is large enough to meet a limit on the activation, if there is one.
    probe = torch.stack([probe, 1000 * probe.flip(0)]).to(weight.dtype)
    with in_mode(module, training=False):
        expected = module.down_proj(module.act_fn(module.gate_proj(probe)) * module.up_proj(probe))
        return torch.allclose(module(probe), expected, rtol=0, atol=0, equal_nan=True)


@functools.cache
def _rotates(function: Callable[..., Any]) -> bool:
    """Returns whether a function `apply_rotary_pos_emb` computes as Llama's."""
    x, cos, sin = torch.linspace(-3, 3, 4 * 24).view(4, 1, 1, 3, 8).unbind()[:3]
    try:
        got = function(x, -x, cos[:, 0], sin[:, 0])
    except Exception:  # it takes other arguments
        return False
    expected = (plainly_rotated(one, cos[:, 0], sin[:, 0]) for one in (x, -x))
    return all(map(torch.equal, got, expected))


def _is_attention(module: Any) -> bool:
    """Returns whether the module's own forward rotates queries and keys as Llama's."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return False
    return ROTARY in forward.__globals__ and _rotates(forward.__globals__[ROTARY])


FITS: dict[type[nn.Module], Callable[[nn.Module], bool]] = {
    LightNorm: _is_norm,
    LightGate: _is_gated,
    LightAttention: _is_attention,
}
