"""Dropout whose mask is never kept."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.autograd import backward_once


class Dropped(NamedTuple):
    """Dropout whose mask is never kept: its seed draws the same positions again.

    The gaps between the dropped entries of a Bernoulli process are geometric, so that p·n numbers are drawn, not n.
    """

    p: float
    seed: int

    @classmethod
    def drawn(cls, p: float) -> Dropped:
        """With a seed from torch's default generator."""
        return cls(p, int(torch.randint(1 << 62, ())))

    @property
    def scale(self) -> float:
        """What the entries that are left are to be multiplied by."""
        return 1 / (1 - self.p)

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Which of `count` entries are dropped, ascending; what lies past the end is `count` itself."""
        generator = torch.Generator(device).manual_seed(self.seed)
        draws = int(
            count * self.p + 8 * math.sqrt(count * self.p) + 16
        )  # 8 deviations: the process passes the end
        uniform = torch.rand(draws, generator=generator, device=device)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-self.p)).to(torch.int64)
        return gaps.add_(1).cumsum(0).sub_(1).clamp_(max=count)

    def zeroed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """A copy of `x` with zeros in the places that are dropped; nothing is scaled."""
        whole = x.new_empty(x.numel() + 1)  # the last takes the positions past the end
        kept: Tensor = whole[:-1].view(x.shape).copy_(x)
        whole.index_fill_(
            0, self.positions(x.numel(), x.device) if positions is None else positions, 0
        )
        return kept

    @staticmethod
    def product_beside(
        delta: Tensor, weight: Tensor, back: Tensor, down: Tensor, scale: float, positions: Tensor
    ) -> Tensor:
        """delta·weight + scale · back·down, the second part not where the input was dropped."""
        whole = delta.new_empty(len(delta) * weight.shape[1] + 1)
        product = torch.mm(delta, weight, out=whole[:-1].view(len(delta), weight.shape[1]))
        alone = whole[positions]
        product.addmm_(back, down, alpha=scale)
        whole[positions] = alone
        return product


class DroppedProduct(torch.autograd.Function):
    """down x̃ for x (…, in) and a frozen down (k, in), of which nothing but `down` is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, drop: Dropped) -> Tensor:
        ctx.drop = drop
        ctx.save_for_backward(down)
        return F.linear(drop.zeroed(x), down * drop.scale)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (down,) = ctx.saved_tensors
        return ctx.drop.zeroed(grad @ (down * ctx.drop.scale)), None, None
