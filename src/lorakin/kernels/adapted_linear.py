"""The adapted linear layer as one autograd function: one pass, and nothing kept for backward that can be made again.

    y = g ⊙ (W0 x + up(down x̃)) + b

Plain autograd keeps float32 copies of inputs, dropout masks and the products between; here backward gets the input and the
r numbers per token `down x̃`, in the base's dtype. Not even the input where `down` never trains (LoRA-FA, VeRA), and the
masks of dropout are drawn again from their seed. The up and down products go into the base's own output and gradient.

The trained tensors stay float32; the products are in the base's dtype.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lorakin.family import Chain, Pair
from lorakin.kernels.autograd import PLAIN, Version, backward_once, plainly
from lorakin.kernels.dropout import Dropped, DroppedProduct


def applies(x: Any, weight: Tensor) -> bool:
    """Whether the functions below compute what F.linear and a pair beside it would.

    They know plain tensors. A compiler makes its own of plain operations; function transforms, tracing and forward-mode
    derivatives need those too.
    """
    if type(x) not in PLAIN or type(weight) not in PLAIN:
        return False
    if not torch.is_autocast_enabled(x.device.type):
        right = x.dtype == weight.dtype
    else:
        right = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    return right and x.device == weight.device and plainly()


class Ready(NamedTuple):
    """A pair as the products take it: in the base's dtype, its scale apart, its gain as the distance from 1.

    A narrow dtype has few digits near 1, so that it would lose most of a gain.
    """

    up: Tensor
    down: Tensor
    scale: float
    more: Tensor | None

    @classmethod
    def of(cls, pair: Pair, scale: float, dtype: torch.dtype) -> Ready:
        """`pair` with its `scale` left apart, in `dtype`."""
        more = None if pair.gain is None else (pair.gain - 1).to(dtype)
        return cls(pair.up.to(dtype), pair.down.to(dtype), scale, more)


def linear_with_pair(
    x: Tensor, weight: Tensor, bias: Tensor | None, pair: Pair, scale: float, dropout: float
) -> Tensor:
    """g ⊙ (W0 x + scale · up(down x̃)) + b of x (…, in), (…, out); under autocast in its dtype."""
    drop = Dropped.drawn(dropout) if dropout else None
    with _autocast_off(x, weight, bias) as (x, weight, bias):
        out: Tensor = LinearWithPair.apply(x, weight, bias, *pair, scale, drop)  # type: ignore[no-untyped-call]
        return out


def linear_with_ready(x: Tensor, weight: Tensor, bias: Tensor | None, ready: Ready) -> Tensor:
    """The same without gradients and dropout, for a pair that is ready."""
    y = _linear(x, weight, bias)
    _add_pair(y, x.reshape(-1, x.shape[-1]) @ ready.down.T, bias, ready)
    return y


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W0 x + b of x (…, in), (…, out), as a tensor that is no view.

    `F.linear` with a bias gives a view of a matrix where x has more than two dimensions. Autograd
    lets nobody write in place into a view that a function returned, as `nn.ReLU(inplace=True)`
    does behind a layer.
    """
    if bias is None or x.dim() < 3:
        return F.linear(x, weight, bias)
    whole = x.new_empty(*x.shape[:-1], len(weight))
    torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T, out=whole.view(-1, len(weight)))
    return whole


def _add_pair(y: Tensor, hidden: Tensor, bias: Tensor | None, ready: Ready) -> None:
    """y ← g ⊙ (y − b + scale · up(hidden)) + b, in place."""
    y.view(-1, y.shape[-1]).addmm_(hidden, ready.up.T, alpha=ready.scale)
    if ready.more is not None:
        y.addcmul_(y if bias is None else y - bias, ready.more)


def linear_with_chain(
    x: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain, dropout: float, siblings: str
) -> Tensor:
    """W0 x + outer ⊙ up(inner ⊙ (down x̃)) + b of x (…, in), (…, out); under autocast in its dtype.

    Modules of the same `siblings` that are called with one x share the product with `down`, unless they drop inputs.
    """
    given = x
    with _autocast_off(x, weight, bias) as (x, weight, bias):
        down, up = _frozen(chain.down), _frozen(chain.up)
        inputs, outputs = weight.shape[1], weight.shape[0]
        narrow = down.narrowed(weight)[:, :inputs]
        inner, outer = chain.inner.to(weight.device), chain.outer.to(weight.device)
        if dropout:
            u = DroppedProduct.apply(x, narrow, Dropped.drawn(dropout))  # type: ignore[no-untyped-call]
        else:
            u = down.product(given, siblings, lambda: Product.apply(x, narrow))  # type: ignore[no-untyped-call]
        count = x.numel() // inputs
        merged = not dropout and 2 * inputs * outputs < count * (2 * outputs + inputs)
        out: Tensor = LinearWithChain.apply(  # type: ignore[no-untyped-call]
            x, u, weight, bias, outer, up.narrowed(weight)[:outputs], inner, narrow, merged
        )
        return out


class Rebuilding(NamedTuple):
    """How a tensor is made again from others that are kept anyway, so that it need not be kept."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    version: int = 0

    @classmethod
    def put(cls, tensor: Tensor, make: Callable[..., Tensor], parts: tuple[Tensor, ...]) -> Tensor:
        """`tensor`, remembering its recipe."""
        recipe = cls(make, tuple(part.detach() for part in parts), tensor._version)
        tensor._lorakin_recipe = recipe  # type: ignore[attr-defined]
        return tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Rebuilding:
        """The tensor's recipe; one that keeps it, if it has none or was changed since."""
        recipe = getattr(tensor, "_lorakin_recipe", None)
        return (
            recipe
            if isinstance(recipe, cls) and recipe.version == tensor._version
            else cls(_itself, (tensor,))
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def _autocast_off(x: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """The tensors in autocast's dtype with autocast off, if it is on; as they are if not."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        yield [x, *others]
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        yield [None if t is None else t.to(dtype) for t in (x, *others)]


class Frozen:
    """What is remembered of a matrix that never trains: itself in another dtype, and the latest product of each place."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = weakref.ref(matrix)
        self.narrow: dict[torch.device, Tensor] = {}
        self.seen: Version | None = None
        self.products: dict[str, tuple[Any, ...]] = {}

    def narrowed(self, like: Tensor) -> Tensor:
        """The matrix in the dtype and on the device of `like`.

        Without gradients it is made anew, since it may be written through `.data`.
        """
        matrix = self.matrix()
        assert matrix is not None
        if not torch.is_grad_enabled():
            return matrix.detach().to(like.device, like.dtype)
        if self.seen is None or not self.seen.is_still(matrix):
            self.narrow, self.seen = {}, Version.of(matrix)
        kept = self.narrow.get(like.device)
        if kept is not None and kept.dtype == like.dtype:
            return kept
        self.products.clear()
        narrow = matrix.detach().to(like.device, like.dtype)
        if self.seen is not None:
            self.narrow[like.device] = narrow
        return narrow

    def product(self, x: Tensor, place: str, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, or what it gave for the same x in the same place as long as a graph holds that."""
        if not (torch.is_grad_enabled() and x.requires_grad) or not self.narrow:
            return compute()
        if (
            (latest := self.products.get(place)) is not None
            and latest[0]() is x
            and latest[1].is_still(x)
        ):
            kept = latest[2]()
            if isinstance(kept, Tensor):
                return kept
        product = compute()
        self.products[place] = weakref.ref(x), Version(x), weakref.ref(product)
        return product


_FROZEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _frozen(matrix: Tensor) -> Frozen:
    if matrix not in _FROZEN:
        _FROZEN[matrix] = Frozen(matrix)
    known: Frozen = _FROZEN[matrix]
    return known


class Product(torch.autograd.Function):
    """down x for x (…, in) and a frozen down (k, in). It keeps nothing that a first backward would give up for a second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> Tensor:
        ctx.down = down
        return F.linear(x, down)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.down, None


class LinearWithPair(torch.autograd.Function):
    """y = g ⊙ (W0 x + scale · up(down x̃)) + b for x (…, in), weight (out, in), up (out, k), down (k, in), gain (out,).

    Without a gain, x̃ may be dropped. For the gradient of the gain, Σ δ ⊙ (y − b)/g, the output is kept, which what follows
    often keeps too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        up: Tensor, down: Tensor, gain: Tensor | None, scale: float, drop: Dropped | None,
    ) -> Tensor:  # fmt: skip
        ctx.drop, ctx.scale = drop, scale if drop is None else scale * drop.scale
        ready = Ready.of(Pair(up, down, gain), ctx.scale, weight.dtype)
        rows, recipe = x.reshape(-1, x.shape[-1]), Rebuilding.of(x)
        hidden = (rows if drop is None else drop.zeroed(rows)) @ ready.down.T
        y = _linear(x, weight, bias)
        _add_pair(y, hidden, bias, ready)
        output = None
        if ctx.needs_input_grad[5]:
            output, ctx.changed = _unwatched(y)
        ctx.make = recipe.make
        parts = recipe.parts if any(ctx.needs_input_grad[n] for n in (1, 4, 5)) else ()
        ctx.save_for_backward(hidden, weight, bias, up, down, ready.more, output, *parts)
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, wide_up, wide_down, more, output, *parts = ctx.saved_tensors
        up, down = wide_up.to(weight.dtype), wide_down.to(weight.dtype)
        needs_x, needs_weight, needs_bias, needs_up, needs_down, needs_gain, *_ = (
            ctx.needs_input_grad
        )
        drop, scale = ctx.drop, ctx.scale
        delta = grad.reshape(-1, grad.shape[-1])

        def rows() -> Tensor:
            made: Tensor = ctx.make(*parts)
            return made.reshape(len(delta), weight.shape[1])

        for_x = for_up = for_down = for_gain = None
        if needs_gain:
            gain = more + 1
            if ctx.changed() or bool(
                (gain.abs() < LEAST_GAIN).any()
            ):  # then the output does not tell what was multiplied
                product, gain = (
                    torch.addmm(rows() @ weight.T, hidden, up.T, alpha=scale),
                    torch.ones_like(gain),
                )
            else:
                product = (
                    output.view(delta.shape) if bias is None else output.view(delta.shape) - bias
                )
            for_gain = (delta * product).sum(0).to(wide_up.dtype) / gain
        for_bias = delta.sum(0) if needs_bias else None
        if more is not None:
            delta = torch.addcmul(delta, delta, more)
        for_weight = delta.T @ rows() if needs_weight else None
        if needs_up:
            for_up = (hidden.T @ delta).T.to(wide_up.dtype).mul_(scale)
        back = delta @ up
        dropped = (
            None if drop is None else drop.positions(len(delta) * weight.shape[1], delta.device)
        )
        if needs_down:
            for_down = (
                (back.T @ (rows() if drop is None else drop.zeroed(rows(), dropped)))
                .to(wide_down.dtype)
                .mul_(scale)
            )
        if needs_x:
            if dropped is None:
                for_x = (delta @ weight).addmm_(back, down, alpha=scale)
            else:
                for_x = drop.product_beside(delta, weight, back, down, scale, dropped)
            for_x = for_x.view(*grad.shape[:-1], weight.shape[1])
        return for_x, for_weight, for_bias, for_up, for_down, for_gain, None, None


LEAST_GAIN = 2**-4
"""Below it an output has lost too many digits of what was multiplied."""


def _unwatched(output: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """The output to keep although others may overwrite it, as an activation in place does; and whether one has.

    Autograd refuses to give back what was overwritten. So it gets an alias that counts its own changes, and an empty tensor
    that counts the output's tells of them.
    """
    counter = output.detach()
    counter.data = output.new_empty(0)
    before = counter._version
    return output.data, lambda: counter._version != before


class LinearWithChain(torch.autograd.Function):
    """y = W0 x + outer ⊙ up(inner ⊙ u) + b, with u = down x (…, k), where nothing but outer (out,) and inner (k,) trains.

    Both gradients come from C = δᵀu (out, k), and neither needs x. Where it is cheaper the weight is W0 + change, for the
    forward and again for the backward, and u takes part in nothing but C.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None,
        outer: Tensor, up: Tensor, inner: Tensor, down: Tensor, merged: bool,
    ) -> Tensor:  # fmt: skip
        ctx.merged = merged
        ctx.save_for_backward(
            x if ctx.needs_input_grad[2] else None, u, weight, outer, up, inner, down
        )
        if merged:
            return _linear(x, _merged(weight, outer, up, inner, down), bias)
        y = _linear(x, weight, bias)
        flat = y.view(-1, y.shape[-1])
        hidden = u.reshape(len(flat), len(inner)) * inner.to(u.dtype)
        if len(flat) < len(inner):  # few tokens: rather their outputs than the matrix
            flat.addcmul_(hidden @ up.T, outer.to(u.dtype))
        else:
            flat.addmm_(hidden, _scaled(outer, up).T)
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, weight, outer, up, inner, down = ctx.saved_tensors
        needs_x, needs_u, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        for_weight = flat.T @ x.reshape(len(flat), weight.shape[1]) if needs_weight else None
        for_bias = flat.sum(0) if needs_bias else None
        common = ((flat.T @ u.reshape(len(flat), len(inner))) * up).to(outer.dtype)
        for_outer, for_inner = common @ inner, outer @ common
        for_x = for_u = None
        if needs_x:
            whole = _merged(weight, outer, up, inner, down) if ctx.merged else weight
            for_x = (flat @ whole).view(*grad.shape[:-1], weight.shape[1])
        if needs_u and not ctx.merged:
            for_u = ((flat @ _scaled(outer, up)) * inner.to(u.dtype)).view(u.shape)
        return for_x, for_u, for_weight, for_bias, for_outer, None, for_inner, None, None


def _scaled(outer: Tensor, up: Tensor) -> Tensor:
    """diag(outer)·up, rounded once to the dtype of `up`."""
    return (outer.unsqueeze(1) * up).to(up.dtype)


def _merged(weight: Tensor, outer: Tensor, up: Tensor, inner: Tensor, down: Tensor) -> Tensor:
    return torch.addmm(weight, _scaled(outer, up), inner.to(down.dtype).unsqueeze(1) * down)
