"""Dropout that keeps a seed instead of a mask."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.autograd import backward_once


class DropoutDraw(NamedTuple):
    """One draw of dropout: its seed gives the same dropped positions again in the backward.

    The gaps between the dropped entries of a Bernoulli process are geometrically distributed. So
    p·n random numbers are drawn for n entries, not n.

    >>> drop, x = DropoutDraw(0.5, seed=1), torch.ones(8)
    >>> torch.equal(drop.zeroed(x), drop.zeroed(x))
    True
    """

    p: float
    seed: int

    @classmethod
    def drawn(cls, p: float) -> DropoutDraw:
        """Returns a draw with probability `p`, its seed from torch's default generator."""
        return cls(p, int(torch.randint(1 << 62, ())))

    @property
    def scale(self) -> float:
        """The factor on the entries that are kept: 1 / (1 − p)."""
        return 1 / (1 - self.p)

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Returns which of `count` entries are dropped, ascending, int64.

        The draws run past the end, and each position there is given as `count`.
        """
        generator = torch.Generator(device).manual_seed(self.seed)
        mean = count * self.p
        # 8 standard deviations more than the mean are enough to pass the end.
        draws = int(mean + 8 * math.sqrt(mean) + 16)
        uniform = torch.rand(draws, generator=generator, device=device)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-self.p)).to(torch.int64)
        return gaps.add_(1).cumsum(0).sub_(1).clamp_(max=count)

    def zeroed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns a copy of `x` with zeros at the dropped positions; nothing is scaled."""
        if positions is None:
            positions = self.positions(x.numel(), x.device)
        # The last entry takes the positions past the end.
        flat = x.new_empty(x.numel() + 1)
        zeroed: Tensor = flat[:-1].view(x.shape).copy_(x)
        flat.index_fill_(0, positions, 0)
        return zeroed

    @staticmethod
    def input_gradient(
        delta: Tensor, weight: Tensor, back: Tensor, down: Tensor, scale: float, positions: Tensor
    ) -> Tensor:
        """Computes the gradient of x: delta·weight, plus scale · back·down where x was not dropped.

        Shapes: delta (rows, outputs), weight (outputs, inputs), back (rows, k), down (k, inputs).
        """
        flat = delta.new_empty(len(delta) * weight.shape[1] + 1)
        product = torch.mm(delta, weight, out=flat[:-1].view(len(delta), weight.shape[1]))
        at_dropped = flat[positions]
        product.addmm_(back, down, alpha=scale)
        flat[positions] = at_dropped
        return product


class DroppedProduct(torch.autograd.Function):
    """down x̃ for x (…, inputs) and a frozen down (k, inputs); keeps nothing but `down`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, drop: DropoutDraw) -> Tensor:
        ctx.drop = drop
        ctx.save_for_backward(down)
        return F.linear(drop.zeroed(x), down * drop.scale)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (down,) = ctx.saved_tensors
        return ctx.drop.zeroed(grad @ (down * ctx.drop.scale)), None, None
