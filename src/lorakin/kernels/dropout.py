"""Dropout that keeps a seed instead of a mask."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor

from lorakin.kernels import triton_operators
from lorakin.kernels.autograd import backward_once, is_capturing
from lorakin.kernels.thin_products import scaled_product


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
        kind: type[DropoutDraw] = DropoutByGaps
        if device.type != "cpu":
            kind = DropoutInKernels if triton_operators.are_usable(device) else DropoutByMask
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

    # The products of an adapter with its dropped input x̃. No factor 1 / (1 − p) is in them.

    def product(self, x: Tensor, down: Tensor) -> Tensor:
        """Returns x̃ downᵀ, (rows, k), for x (rows, inputs) and down (k, inputs)."""
        return self.zeroed(x) @ down.T

    def down_gradient(
        self, back: Tensor, x: Tensor, scale: float, entries: Tensor | None = None
    ) -> Tensor:
        """Returns scale · backᵀ x̃, (k, inputs), for back (rows, k) and x (rows, inputs)."""
        return scaled_product(back, self.zeroed(x, entries), scale)

    def input_gradient(
        self,
        delta: Tensor,
        weight: Tensor,
        back: Tensor,
        down: Tensor,
        scale: float,
        entries: Tensor | None = None,
    ) -> Tensor:
        """Returns δ W0, and scale · back down where x was kept: (rows, inputs)."""
        through = delta.new_empty(len(delta), weight.shape[1])
        through.addmm_(back, down, beta=0, alpha=scale)
        return self.zeroed(through, entries).addmm_(delta, weight)


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


class DropoutInKernels(DropoutDraw):
    """Dropout for GPUs with Triton: each kernel computes again what is dropped, none is written.

    The probability is rounded to a whole number of 65536ths.
    """

    @property
    def threshold(self) -> int:
        """What a random number below 65536 must reach for its entry to be kept."""
        return min(65535, round(self.p * 65536))

    @property
    def scale(self) -> float:
        return 65536 / (65536 - self.threshold)

    def entries(self, like: Tensor) -> Tensor:
        return like.new_empty(0)  # the kernels need none

    def zeroed(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        zeroed: Tensor = torch.ops.lorakin.zeroed(x, self.seed, self.threshold)
        return zeroed

    def product(self, x: Tensor, down: Tensor) -> Tensor:
        if not triton_operators.fit(x, down, rank=len(down)):
            return super().product(x, down)
        parts = torch.ops.lorakin.dropped_product(x, down, self.seed, self.threshold)
        return triton_operators.sum_of_parts(parts, x.dtype)

    def down_gradient(
        self, back: Tensor, x: Tensor, scale: float, entries: Tensor | None = None
    ) -> Tensor:
        if not triton_operators.fit(back, x, rank=back.shape[1]):
            return super().down_gradient(back, x, scale, entries)
        parts = torch.ops.lorakin.dropped_down_gradient(back, x, scale, self.seed, self.threshold)
        return triton_operators.sum_of_parts(parts, x.dtype)

    def input_gradient(
        self,
        delta: Tensor,
        weight: Tensor,
        back: Tensor,
        down: Tensor,
        scale: float,
        entries: Tensor | None = None,
    ) -> Tensor:
        if not triton_operators.fit(delta, weight, back, down, rank=len(down)):
            return super().input_gradient(delta, weight, back, down, scale, entries)
        through: Tensor = torch.ops.lorakin.dropped_input_product(
            back, down, scale, self.seed, self.threshold
        )
        return through.addmm_(delta, weight)


class DroppedProduct(torch.autograd.Function):
    """down x̃ for x (…, inputs) and a frozen down (k, inputs); keeps nothing but `down`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, drop: DropoutDraw) -> Tensor:
        ctx.drop = drop
        ctx.save_for_backward(down)
        flat = drop.product(x.reshape(-1, x.shape[-1]), down * drop.scale)
        return flat.view(*x.shape[:-1], len(down))

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (down,) = ctx.saved_tensors
        rows = grad.reshape(-1, len(down))
        back = rows.new_empty(len(rows), down.shape[1])
        back.addmm_(rows, down, beta=0, alpha=ctx.drop.scale)
        # As rows, like the input of `product`: a draw in a CUDA graph keeps its mask.
        return ctx.drop.zeroed(back).view(*grad.shape[:-1], down.shape[1]), None, None
