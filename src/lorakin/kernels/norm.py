"""RMSNorm as Llama's, that keeps its input and one number per token.

Layers that need its output in the backward compute it again (`recomputation.py`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lorakin.kernels.autograd import backward_once
from lorakin.kernels.liger_operators import fit
from lorakin.kernels.recomputation import Once, Recomputation


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Computes w · (x / √(mean x² + ε)) over the last dimension: (…, inputs), in the dtype of x.

    On a GPU by Liger's kernels, where they are installed.

    >>> rms_norm(torch.tensor([3.0, -4.0]), torch.ones(2), 0.0)
    tensor([ 0.8485, -1.1314])
    """
    if fit(x, weight):
        out: Tensor = LigerNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
        return Recomputation.attach(
            out, Once(functools.partial(_by_liger, epsilon=epsilon)), (x, weight)
        )
    scale = scale_of(x.detach(), epsilon)
    out = Norm.apply(x, weight, scale)  # type: ignore[no-untyped-call]
    return Recomputation.attach(out, normed, (x, scale, weight))


class Norm(torch.autograd.Function):
    """w · (x · scale) over the last dimension, in float32 and rounded before w, as Llama's.

    `scale` is `scale_of(x)`; the gradient accounts for its dependence on x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        return normed(x, scale, weight)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        direction = x.float() * scale  # not x · scale: mixed dtypes are slow
        for_weight = for_x = None
        if needs_weight:
            for_weight = (grad * direction.to(x.dtype)).flatten(0, -2).sum(0)
        if needs_x:
            wide = (grad * weight).float()
            along = (wide * direction).mean(-1, keepdim=True)
            for_x = wide.sub_(direction.mul_(along)).mul_(scale).to(x.dtype)
        return for_x, for_weight, None


def scale_of(x: Tensor, epsilon: Any) -> Tensor:
    """Computes 1 / √(mean x² + ε) over the last dimension: (…, 1), float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)


def normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Computes the output of `Norm` from the scale of each token."""
    return weight * (x.float() * scale).to(x.dtype)


class LigerNorm(torch.autograd.Function):
    """What `Norm` computes, one kernel forward and two backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        y, scale = torch.ops.lorakin.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            return *torch.ops.lorakin.rms_norm_backward_of_both(grad, *ctx.saved_tensors), None
        return torch.ops.lorakin.rms_norm_backward(grad, *ctx.saved_tensors), None, None


def _by_liger(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.ops.lorakin.rms_norm(x, weight, epsilon)[0]  # type: ignore[no-any-return]
