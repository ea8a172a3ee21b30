"""Dropout that keeps a seed instead of a mask."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.autograd import backward_once, is_capturing


class DropoutDraw(abc.ABC):
    """One draw of dropout: its seed gives the same dropped entries again in the backward.

    >>> drop, x = DropoutDraw.drawn(0.5, torch.device("cpu")), torch.ones(8)
    >>> torch.equal(drop.zeroed(x), drop.zeroed(x))
    True
    """

    def __init__(self, p: float, seed: int) -> None:
        self.p = p
        self.seed = seed

    @staticmethod
    def drawn(p: float, device: torch.device) -> DropoutDraw:
        """Returns a draw with probability `p`, its seed from the CPU's default generator."""
        if is_capturing():
            return DropoutInGraph(p, 0)
        kind = DropoutByGaps if device.type == "cpu" else DropoutByMask
        return kind(p, int(torch.randint(1 << 62, (), device="cpu")))

    @property
    def scale(self) -> float:
        """The factor on the entries that are kept: 1 / (1 − p)."""
        return 1 / (1 - self.p)

    @abc.abstractmethod
    def entries(self, like: Tensor) -> Tensor:
        """Returns which entries of a tensor like `like` are dropped, in the form that suits it."""

    @abc.abstractmethod
    def zeroed(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        """Returns a copy of `x` with zeros at the dropped entries; nothing is scaled."""


class DropoutByGaps(DropoutDraw):
    """Dropout for CPUs, to which random numbers are dear.

    The gaps between the dropped entries of a Bernoulli process are geometrically distributed. So
    p·n random numbers are drawn for n entries, not n. `entries` are positions, ascending.
    """

    def entries(self, like: Tensor) -> Tensor:
        count = like.numel()
        generator = torch.Generator().manual_seed(self.seed)
        mean = count * self.p
        # 8 standard deviations more than the mean are enough to pass the end. Each position past
        # the end is given as `count`.
        draws = int(mean + 8 * math.sqrt(mean) + 16)
        uniform = torch.rand(draws, generator=generator, device=like.device)
        gaps = uniform.neg_().log1p_().div_(math.log1p(-self.p)).to(torch.int64)
        return gaps.add_(1).cumsum(0).sub_(1).clamp_(max=count)

    def zeroed(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        positions = self.entries(x) if entries is None else entries
        # The last entry takes the positions past the end.
        flat = x.new_empty(x.numel() + 1)
        zeroed: Tensor = flat[:-1].view(x.shape).copy_(x)
        flat.index_fill_(0, positions, 0)
        return zeroed


class DropoutByMask(DropoutDraw):
    """Dropout for GPUs, to which kernels are dear. `entries` is a mask, true for what is kept."""

    def entries(self, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(self.seed)
        mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
        return mask.bernoulli_(1 - self.p, generator=generator)

    def zeroed(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        return x * (self.entries(x) if entries is None else entries)


class DropoutInGraph(DropoutByMask):
    """Dropout in a CUDA graph. A seed would be the same in each replay, so the mask is kept.

    The device's default generator draws it, which torch moves on with each replay.
    """

    def __init__(self, p: float, seed: int) -> None:
        super().__init__(p, seed)
        self.mask: Tensor | None = None

    def entries(self, like: Tensor) -> Tensor:
        if self.mask is None:
            mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
            self.mask = mask.bernoulli_(1 - self.p)
        return self.mask


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
        rows = grad.reshape(-1, len(down))
        back = rows.new_empty(len(rows), down.shape[1])
        back.addmm_(rows, down, beta=0, alpha=ctx.drop.scale)
        return ctx.drop.zeroed(back.view(*grad.shape[:-1], down.shape[1])), None, None
