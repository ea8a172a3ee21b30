"""An nn.Linear with a gain behind dropout, as DoRA with dropout, as a single autograd function.

    y = W0 x + (g − 1) ⊙ (W0 x̃) + g ⊙ s·up(down x̃) + b        x̃ = x ⊙ mask / (1 − p)

The gain acts on what dropout left of x, so W0 is multiplied twice. With v = (W0 + s·up·down) x̃:

    y = W0 x + b + s·up(down x̃) + (g − 1) ⊙ v        ∂g = Σ δ ⊙ v
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorakin.kernels.autograd import backward_once
from lorakin.kernels.base_linear import adapted_input_gradient, adapted_product
from lorakin.kernels.dropout import DropoutDraw
from lorakin.kernels.gained import dropped_gain_gradient, minus_one
from lorakin.kernels.recomputation import Recomputation
from lorakin.kernels.thin_products import scaled_product
from lorakin.kernels.weight_source import Weight, kept_form


class LinearWithDroppedGain(torch.autograd.Function):
    """y as above. Shapes as in `LinearWithPair`, gain (outputs,); keeps v beside x.

    `drop.zeroed` leaves out the factor 1 / (1 − p), which stands beside the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        gain: Tensor,
        scale: float,
        drop: DropoutDraw,
    ) -> Tensor:
        ctx.scale, ctx.drop, ctx.gain_dtype = scale, drop, gain.dtype
        gain_minus_one = minus_one(gain, weight.dtype)
        dropped = drop.zeroed(x.reshape(-1, x.shape[-1]))
        hidden = dropped @ down.T

        v = adapted_product(dropped, weight, None, hidden, up, scale)
        y = adapted_product(x, weight, bias, hidden, up, drop.scale * scale)
        y.view(-1, y.shape[-1]).addcmul_(v, gain_minus_one, value=drop.scale)

        _, needs_weight, _, _, needs_down, needs_gain, *_ = ctx.needs_input_grad
        recipe = Recomputation.of(x)
        ctx.make = recipe.make
        parts = recipe.parts_to_keep() if needs_weight or needs_down else ()
        kept = v if needs_gain else None
        stored, ctx.unpack = kept_form(weight)
        ctx.save_for_backward(hidden, stored, up, down, gain_minus_one, kept, *parts)
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, stored, up, down, gain_minus_one, v, *parts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_up, needs_down, needs_gain, *_ = (
            ctx.needs_input_grad
        )
        drop, factor = ctx.drop, ctx.drop.scale
        delta = grad.reshape(-1, grad.shape[-1])
        for_bias = delta.sum(0) if needs_bias else None
        for_gain = None
        if needs_gain:
            for_gain, delta_gained, delta_less = dropped_gain_gradient(
                delta, v, gain_minus_one, ctx.gain_dtype
            )
            for_gain.mul_(factor)
        else:
            delta_less = delta * gain_minus_one
            delta_gained = delta + delta_less

        for_up = scaled_product(delta_gained, hidden, factor * ctx.scale) if needs_up else None
        back = delta_gained @ up

        for_down = for_weight = entries = None
        if needs_down or needs_weight:
            rows = ctx.make(*parts).reshape(len(delta), down.shape[1])
            entries = drop.entries(rows)
            if needs_down:
                for_down = drop.down_gradient(back, rows, factor * ctx.scale, entries)
            if needs_weight:
                dropped = drop.zeroed(rows, entries)
                for_weight = (delta.T @ rows).addmm_(delta_less.T, dropped, alpha=factor)

        for_x = None
        if needs_x:
            weight = ctx.unpack(stored)
            through = adapted_input_gradient(delta_less, weight, back, down, ctx.scale)
            for_x = drop.zeroed(through, entries).addmm_(delta, weight, beta=factor)
            for_x = for_x.view(*grad.shape[:-1], weight.shape[1])
        return for_x, for_weight, for_bias, for_up, for_down, for_gain, None, None
