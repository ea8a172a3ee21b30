"""Rotary position embedding as Llama's, in one kernel for the queries and one for the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorakin.kernels.autograd import backward_once
from lorakin.kernels.liger_operators import fit

Rotary = Callable[..., tuple[Tensor, Tensor]]
"""transformers' `apply_rotary_pos_emb(q, k, cos, sin)`."""


class Rotated(torch.autograd.Function):
    """x ⊙ cos + (−x₂, x₁) ⊙ sin for x = (x₁, x₂) (rows, heads, length, size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.lorakin.rotated(x, cos, sin, False)  # type: ignore[no-any-return]

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.lorakin.rotated(grad, *ctx.saved_tensors, True), None, None


def plainly_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes what `Rotated` does by torch's operations.

    >>> plainly_rotated(torch.tensor([[[[3.0, 4.0]]]]), torch.zeros(1, 1, 2), torch.ones(1, 1, 2))
    tensor([[[[-4.,  3.]]]])
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def in_place_of(own: Rotary) -> Rotary:
    """Returns a function that rotates by our kernels what they can, and the rest as `own` does."""

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        if others or more or not _applies(q, k, cos, sin):
            return own(q, k, cos, sin, *others, **more)
        return Rotated.apply(q, cos, sin), Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    return rotary


def _applies(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    has_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if not has_backward or cos.requires_grad or not fit(q, k, cos, sin):
        return False
    rows, _, length, size = q.shape
    angles = {(1, length, size), (rows, length, size)}
    return size % 2 == 0 and k.shape[::2] == q.shape[::2] and cos.shape == sin.shape in angles
