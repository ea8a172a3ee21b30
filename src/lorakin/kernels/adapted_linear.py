"""An nn.Linear with one adapter, computed as a single autograd function.

    y = g ⊙ (W0 x + s · up(down x̃)) + b        x̃ is x after the adapter's dropout

`Adapted._fused_output` calls `adapted_linear`; inject/adapted.py describes the path of a forward up
to here. `adapted_linear` turns autocast off, casts to its dtype, and picks the function for the
form of the change: `ScaledPair` → `LinearWithPair` (`LinearWithDroppedGain` for a gain behind
dropout), `Chain` → `LinearWithChain`, `CastPair`
(inference) → plain products. `LinearWithPair.forward` multiplies by W0 and adds the low-rank
product into that output; its `backward` recomputes what it can instead of keeping it.

Plain autograd would keep float32 copies of the inputs, dropout masks, and the products in between.
`LinearWithPair` keeps x and, in the base's dtype, the r values per token `down x̃`. Where `down`
does not train (LoRA-FA, VeRA) it does not even keep x. A dropout mask is drawn again from its seed.

The adapter's parameters stay in float32. Products are computed in the base's dtype, to which
inject/cast_tensors.py has cast the pair; a gain is cast here, as its distance from 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakin.family import Chain, Pair
from lorakin.family.pair import ScaledPair
from lorakin.kernels.autograd import PLAIN_TYPES, backward_once, runs_eagerly
from lorakin.kernels.base_linear import adapted_input_gradient, adapted_product
from lorakin.kernels.dropout import DropoutDraw
from lorakin.kernels.gained import gain_gradient, minus_one
from lorakin.kernels.linear_with_chain import linear_with_chain
from lorakin.kernels.linear_with_dropped_gain import LinearWithDroppedGain
from lorakin.kernels.recomputation import Recomputation
from lorakin.kernels.thin_products import scaled_product
from lorakin.kernels.weight_source import Weight, WeightSource, kept_form

LEAST_DIVISOR = 2**-4
"""A gain below this leaves too few digits in the output to divide by it."""
NO_ZERO = 1e-20
"""Added to a gain in float32, it changes nothing but 0."""


class CastPair(NamedTuple):
    """A pair cast to the base's dtype, its scale apart, its gain as the distance from 1.

    A narrow dtype has few digits near 1: cast to bfloat16, a gain of 1.001 would be 1.
    """

    up: Tensor
    down: Tensor
    scale: float
    gain_minus_one: Tensor | None

    @classmethod
    def of(cls, pair: Pair, scale: float, dtype: torch.dtype) -> CastPair:
        """Casts `pair` to `dtype`.

        >>> pair = Pair(torch.ones(2, 1), torch.ones(1, 2), gain=torch.ones(2))
        >>> CastPair.of(pair, 0.5, torch.bfloat16).gain_minus_one
        tensor([0., 0.], dtype=torch.bfloat16)
        """
        gain_minus_one = None if pair.gain is None else minus_one(pair.gain, dtype)
        return cls(pair.up.to(dtype), pair.down.to(dtype), scale, gain_minus_one)


LinearChange = ScaledPair | Chain | CastPair
"""The forms of a change that `adapted_linear` computes with."""


def applies(x: Any, weight: Any) -> bool:
    """Returns whether `adapted_linear` can compute the layer for this input and weight.

    It needs plain tensors on one device, of one dtype unless autocast makes them so. Compilers,
    tracers, function transforms and forward-mode derivatives need plain operations instead.

    >>> applies(torch.ones(1, 2), torch.eye(2)), applies(torch.ones(1, 2), torch.eye(2).double())
    (True, False)
    """
    if type(x) not in PLAIN_TYPES or type(weight) not in PLAIN_TYPES or x.device != weight.device:
        return False
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype == weight.dtype and runs_eagerly()
    return x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype) and runs_eagerly()


def adapted_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    change: LinearChange,
    dropout: float = 0.0,
    group: str = "",
) -> Tensor:
    """Computes the output of a linear layer together with an adapter's change.

    Args:
        x: (…, inputs).
        weight: (outputs, inputs), the base's; of a quantised layer a `WeightSource`.
        bias: (outputs,) or None.
        change: what the adapter does. A `CastPair` has no gradients and no dropout.
        dropout: the probability of zeroing an entry of the adapter's input.
        group: a name that modules have in common which may share `down x` of a `Chain`.

    Returns:
        (…, outputs), in autocast's dtype if that is on, else in the dtype of x. Quantised layers
        return the dtype of x, also under autocast.

    >>> x, weight = torch.ones(2, 3), torch.eye(3)
    >>> pair = Pair(up=torch.ones(3, 1), down=torch.ones(1, 3))
    >>> adapted_linear(x, weight, None, ScaledPair(pair, 0.5))
    tensor([[2.5000, 2.5000, 2.5000],
            [2.5000, 2.5000, 2.5000]])
    """
    kind = x.device.type
    is_quantised, autocast = isinstance(weight, WeightSource), torch.is_autocast_enabled(kind)
    if not (is_quantised or autocast):
        return _dispatch(x, x, weight, bias, change, dropout, group)

    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    cast_bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
        cast_x, cast_weight = _cast_input(x, dtype), weight.to(dtype)
        y = _dispatch(x, cast_x, cast_weight, cast_bias, change, dropout, group)
        return y.to(x.dtype) if is_quantised else y


def _cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x in `dtype`; where that is wider, autograd keeps x, and the backward casts it."""
    cast = x.to(dtype)
    if cast is x or dtype.itemsize <= x.dtype.itemsize:
        return cast
    make, parts, _ = Recomputation.of(x)
    return Recomputation.attach(cast, lambda *parts: make(*parts).to(dtype), parts)


def _dispatch(
    given: Tensor,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    change: LinearChange,
    dropout: float,
    group: str,
) -> Tensor:
    """Runs the function for this form of change. `given` is x before autocast."""
    if isinstance(change, ScaledPair):
        (up, down, gain), scale = change
        up, down = up.to(weight.dtype), down.to(weight.dtype)
        drop = DropoutDraw.drawn(dropout, x.device) if dropout else None
        kernel = LinearWithPair if drop is None or gain is None else LinearWithDroppedGain
        return kernel.apply(x, weight, bias, up, down, gain, scale, drop)  # type: ignore[no-untyped-call, no-any-return]
    if isinstance(change, Chain):
        return linear_with_chain(given, x, weight, bias, change, dropout, group)

    hidden = x.reshape(-1, x.shape[-1]) @ change.down.T
    y = adapted_product(x, weight, bias, hidden, change.up, change.scale)
    if change.gain_minus_one is not None:
        _multiply(y, change.gain_minus_one, bias)
    return y


def _multiply(y: Tensor, gain_minus_one: Tensor, bias: Tensor | None) -> None:
    """Changes y to g ⊙ (y − b) + b, in place."""
    y.addcmul_(y if bias is None else y - bias, gain_minus_one)


class LinearWithPair(torch.autograd.Function):
    """y = g ⊙ (W0 x + scale · up(down x̃)) + b. Any of its tensors may need a gradient.

    Shapes: x (…, inputs), weight (outputs, inputs), up (outputs, k), down (k, inputs), gain
    (outputs,) or None. There is no dropout beside a gain.

    The gain's gradient is Σ δ ⊙ (y − b)/g. So the output is kept, which the next layer often keeps
    too. A small gain leaves too few digits in y − b. A CPU then computes again what the gain
    multiplied; a GPU, which would have to wait to learn that a gain is small, keeps it instead of
    the output where there is a bias. Without a bias a GPU multiplies by the gain itself, not by
    what is left of g − 1 in a narrow dtype, and by `NO_ZERO` instead of 0. So the division is as
    accurate for a small gain as for a large one, down to what float16 can hold.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        gain: Tensor | None,
        scale: float,
        drop: DropoutDraw | None,
    ) -> Tensor:
        ctx.drop, ctx.scale = drop, scale if drop is None else scale * drop.scale
        _, needs_weight, _, _, needs_down, needs_gain, *_ = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        hidden = rows @ down.T if drop is None else drop.product(rows, down)

        on_gpu = x.device.type != "cpu"
        ctx.keeps_multiplied = needs_gain and bias is not None and on_gpu
        bias_in_product = None if ctx.keeps_multiplied else bias
        y = adapted_product(x, weight, bias_in_product, hidden, up, ctx.scale)
        kept = gain_minus_one = None
        if gain is not None and not (needs_gain and on_gpu and bias is None):
            gain_minus_one = minus_one(gain, weight.dtype)
        if ctx.keeps_multiplied:
            assert bias is not None and gain_minus_one is not None
            kept, y = y, torch.addcmul(y + bias, y, gain_minus_one)
        elif gain is not None:
            if gain_minus_one is None:
                gain = gain + NO_ZERO
                y.mul_(gain)
            else:
                _multiply(y, gain_minus_one, bias)
            if needs_gain:
                kept, ctx.was_overwritten = _alias_without_version(y)

        recipe = Recomputation.of(x)
        ctx.make = recipe.make
        parts = recipe.parts if needs_gain else ()
        if needs_weight or needs_down:
            parts = recipe.parts_to_keep()
        stored, ctx.unpack = kept_form(weight)
        ctx.save_for_backward(hidden, stored, bias, up, down, gain, gain_minus_one, kept, *parts)
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, stored, bias, up, down, gain, gain_minus_one, kept, *parts = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_up, needs_down, needs_gain, *_ = (
            ctx.needs_input_grad
        )
        drop, scale = ctx.drop, ctx.scale
        delta = grad.reshape(-1, grad.shape[-1])

        def rows() -> Tensor:
            x: Tensor = ctx.make(*parts)
            return x.reshape(len(delta), down.shape[1])

        for_bias = delta.sum(0) if needs_bias else None
        for_gain = weight = None
        if needs_gain:
            divisor = None
            if ctx.keeps_multiplied:
                multiplied, offset = kept, None
            elif ctx.was_overwritten() or _is_small(gain):
                # Then the output does not tell what the gain multiplied: compute that again.
                weight = ctx.unpack(stored)
                multiplied, offset = (rows() @ weight.T).addmm_(hidden, up.T, alpha=scale), None
            else:
                # A GPU's gain has no zero any more. On a CPU no gain is small.
                multiplied, offset, divisor = kept, bias, gain
            if gain_minus_one is None:
                gain_minus_one = minus_one(gain, delta.dtype)
            for_gain, delta = gain_gradient(
                delta, multiplied.view(delta.shape), offset, gain_minus_one, gain.dtype
            )
            for_gain = for_gain if divisor is None else for_gain / divisor
        elif gain_minus_one is not None:
            delta = torch.addcmul(delta, delta, gain_minus_one)

        for_weight = delta.T @ rows() if needs_weight else None
        for_up = scaled_product(delta, hidden, scale) if needs_up else None

        back = delta @ up
        for_down = dropped = None
        if needs_down and drop is None:
            for_down = scaled_product(back, rows(), scale)
        elif needs_down:
            inputs = rows()
            dropped = drop.entries(inputs)
            for_down = drop.down_gradient(back, inputs, scale, dropped)

        for_x = None
        if needs_x:
            weight = ctx.unpack(stored) if weight is None else weight
            if drop is None:
                for_x = adapted_input_gradient(delta, weight, back, down, scale)
            else:
                for_x = drop.input_gradient(delta, weight, back, down, scale, dropped)
            for_x = for_x.view(*grad.shape[:-1], weight.shape[1])
        return for_x, for_weight, for_bias, for_up, for_down, for_gain, None, None


def _is_small(gain: Tensor) -> bool:
    """Returns whether an entry is too small to divide by; False for a GPU, which is not asked."""
    return gain.device.type == "cpu" and bool((gain.abs() < LEAST_DIVISOR).any())


def _alias_without_version(output: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """Returns the output to keep, and a function that says whether something overwrote it since.

    An activation may write into the output in place, and autograd then refuses to give the saved
    tensor back. So what is saved is an alias with a version counter of its own; an empty tensor
    shares the output's counter and tells of changes.
    """
    counter = output.detach()
    counter.data = output.new_empty(0)
    before = counter._version
    return output.data, lambda: counter._version != before
