"""Casts many tensors to one dtype with one kernel, and their gradients back with another.

A GPU takes as long to start a kernel as to cast some hundred adapters' tensors, so casting them
one by one in each layer costs more than the adapters' products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns copies of `tensors` in `dtype`; gradients go back to them in their own dtypes.

    All must be on one device. A tensor that is given twice gets two copies, whose gradients are
    added in its own dtype.

    >>> a, b = torch.ones(2, requires_grad=True), torch.zeros(1)
    >>> copies = cast_together([a, b], torch.bfloat16)
    >>> [(copy.dtype, copy.requires_grad) for copy in copies]
    [(torch.bfloat16, True), (torch.bfloat16, False)]
    """
    return list(CastTogether.apply(dtype, *tensors)) if tensors else []  # type: ignore[no-untyped-call]


class CastTogether(torch.autograd.Function):
    """Copies of all tensors in one dtype. It keeps none of their values for the backward."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.originals = [(t.shape, t.dtype, t.device) for t in tensors]
        copies = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in tensors]
        torch._foreach_copy_(copies, tensors)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(
            *(copy for copy, needs in zip(copies, needed, strict=True) if not needs)
        )
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = {n: grad for n, grad in enumerate(grads) if grad is not None}
        wide: dict[int, Tensor] = {}
        for n in used:
            shape, dtype, device = ctx.originals[n]
            wide[n] = torch.empty(shape, dtype=dtype, device=device)
        if used:
            torch._foreach_copy_(list(wide.values()), list(used.values()))
        return None, *(wide.get(n) for n in range(len(grads)))
