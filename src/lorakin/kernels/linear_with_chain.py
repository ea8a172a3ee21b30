"""A linear layer beside frozen matrices of which only two vectors train, as in VeRA.

    y = W0 x + outer ⊙ up(inner ⊙ u) + b        u = down x̃

`up` and `down` never train and are the same for many modules. So they are cast once, and modules
that are called with the same x, such as q_proj, k_proj and v_proj, compute u once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lorakin.family import Chain
from lorakin.kernels.autograd import Version, backward_once, is_capturing
from lorakin.kernels.base_linear import base_linear
from lorakin.kernels.dropout import DropoutDraw, DroppedProduct
from lorakin.kernels.weight_source import Weight, WeightSource, kept_form


def linear_with_chain(
    given: Tensor,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    chain: Chain,
    dropout: float,
    group: str,
) -> Tensor:
    """Computes W0 x + outer ⊙ up(inner ⊙ (down x̃)) + b.

    Args:
        given: the module's input before autocast; modules share u if they were given the same one.
        x: (…, inputs), `given` in the dtype of `weight`.
        weight: (outputs, inputs).
        bias: (outputs,) or None.
        chain: its matrices may have more rows and columns than are needed here.
        dropout: the probability of zeroing an entry of x; with dropout nothing is shared.
        group: a name that the modules which may share u have in common.

    Returns:
        (…, outputs), in the dtype of `weight`.

    >>> chain = Chain(torch.ones(2), torch.eye(2), torch.ones(2), torch.eye(2))
    >>> x = torch.ones(1, 2)
    >>> linear_with_chain(x, x, torch.eye(2), None, chain, dropout=0.0, group="attention")
    tensor([[2., 2.]])
    """
    outputs, inputs = weight.shape
    down, up = _frozen(chain.down), _frozen(chain.up)
    narrow_down = down.narrowed(weight)[:, :inputs]
    inner, outer = chain.inner.to(weight.device), chain.outer.to(weight.device)

    if dropout:
        u = DroppedProduct.apply(x, narrow_down, DropoutDraw.drawn(dropout, x.device))  # type: ignore[no-untyped-call]
    else:
        u = down.product(given, group, lambda: SharedProduct.apply(x, narrow_down))  # type: ignore[no-untyped-call]

    # For many tokens one product with the changed weight takes fewer operations than two beside it.
    tokens = x.numel() // inputs
    merged = not dropout and 2 * inputs * outputs < tokens * (2 * outputs + inputs)
    merged = merged and not (isinstance(weight, WeightSource) and not weight.is_exact)
    narrow_up = up.narrowed(weight)[:outputs]
    return LinearWithChain.apply(x, u, weight, bias, outer, narrow_up, inner, narrow_down, merged)  # type: ignore[no-untyped-call, no-any-return]


class FrozenMatrixCache:
    """Caches what is computed from a matrix that never trains.

    `narrow` holds it in the base's dtype, by device. `products` holds the latest product for each
    group of modules, without keeping it alive.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = weakref.ref(matrix)
        self.narrow: dict[torch.device, Tensor] = {}
        self.seen: Version | None = None
        self.products: dict[str, tuple[Any, ...]] = {}

    def narrowed(self, like: Weight) -> Tensor:
        """Returns the matrix in the dtype and on the device of `like`.

        Without gradients it is cast each time, since somebody may write through `.data`.
        """
        matrix = self.matrix()
        assert matrix is not None
        if not torch.is_grad_enabled():
            return matrix.detach().to(like.device, like.dtype)
        if self.seen is None or not self.seen.is_still(matrix):
            self.narrow, self.seen = {}, Version.of(matrix)
        cached = self.narrow.get(like.device)
        if cached is not None and cached.dtype == like.dtype:
            return cached

        self.products.clear()
        narrow = matrix.detach().to(like.device, like.dtype)
        # What a graph captures has its values only once the graph is replayed.
        if self.seen is not None and not is_capturing():
            self.narrow[like.device] = narrow
        return narrow

    def product(self, x: Tensor, group: str, compute: Callable[[], Tensor]) -> Tensor:
        """Returns `compute()`, or its last result if a module of the group got the same x.

        The last result counts for as long as an autograd graph holds it, and within a CUDA graph
        or outside.
        """
        if not (torch.is_grad_enabled() and x.requires_grad) or not self.narrow:
            return compute()
        group = f"{group} in a CUDA graph" if is_capturing() else group
        if (latest := self.products.get(group)) is not None:
            last_x, version, result = latest
            if last_x() is x and version.is_still(x) and isinstance(product := result(), Tensor):
                return product
        product = compute()
        self.products[group] = weakref.ref(x), Version(x), weakref.ref(product)
        return product


_FROZEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _frozen(matrix: Tensor) -> FrozenMatrixCache:
    if matrix not in _FROZEN:
        _FROZEN[matrix] = FrozenMatrixCache(matrix)
    cache: FrozenMatrixCache = _FROZEN[matrix]
    return cache


class SharedProduct(torch.autograd.Function):
    """down x for x (…, inputs) and a frozen down (k, inputs).

    Several modules share the result, so it keeps nothing that a first backward would free and a
    second would miss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.down = down
        return F.linear(x, down)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        # Where the layers multiply by the changed weight, no gradient comes through u.
        return None if grad is None else grad @ ctx.down, None


class LinearWithChain(torch.autograd.Function):
    """y = W0 x + outer ⊙ up(inner ⊙ u) + b, where outer (outputs,) and inner (k,) train.

    Both gradients come from C = δᵀu (outputs, k), so x is kept only where W0 trains. With `merged`
    the forward and the backward multiply by W0 + change, and u serves C alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        weight: Weight,
        bias: Tensor | None,
        outer: Tensor,
        up: Tensor,
        inner: Tensor,
        down: Tensor,
        merged: bool,
    ) -> Tensor:
        ctx.merged = merged
        x_for_weight = x if ctx.needs_input_grad[2] else None
        stored, ctx.unpack = kept_form(weight)
        ctx.is_unpacked = isinstance(weight, WeightSource)
        ctx.save_for_backward(x_for_weight, u, stored, outer, up, inner, down)
        if merged:
            factors = outer, up, inner, down
            return base_linear(x, _merged(ctx.unpack(stored), ctx.is_unpacked, *factors), bias)

        y = base_linear(x, weight, bias)
        flat = y.view(-1, y.shape[-1])
        hidden = u.reshape(len(flat), len(inner)) * inner.to(u.dtype)
        if len(flat) < len(inner):
            # With few tokens it is cheaper to scale their outputs than `up`.
            flat.addcmul_(hidden @ up.T, outer.to(u.dtype))
        else:
            flat.addmm_(hidden, _scaled(outer, up).T)
        return y

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, stored, outer, up, inner, down = ctx.saved_tensors
        needs_x, needs_u, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        delta = grad.reshape(-1, grad.shape[-1])

        for_weight = delta.T @ x.reshape(len(delta), down.shape[1]) if needs_weight else None
        for_bias = delta.sum(0) if needs_bias else None
        common = ((delta.T @ u.reshape(len(delta), len(inner))) * up).to(outer.dtype)
        for_outer, for_inner = common @ inner, common.T @ outer

        for_x = for_u = None
        if needs_x:
            effective = ctx.unpack(stored)
            if ctx.merged:
                effective = _merged(effective, ctx.is_unpacked, outer, up, inner, down)
            for_x = (delta @ effective).view(*grad.shape[:-1], down.shape[1])
        if needs_u and not ctx.merged:
            for_u = ((delta @ _scaled(outer, up)) * inner.to(u.dtype)).view(u.shape)
        return for_x, for_u, for_weight, for_bias, for_outer, None, for_inner, None, None


def _scaled(outer: Tensor, up: Tensor) -> Tensor:
    """Returns diag(outer)·up, rounded once to the dtype of `up`."""
    return (outer.unsqueeze(1) * up).to(up.dtype)


def _merged(
    weight: Tensor, may_overwrite: bool, outer: Tensor, up: Tensor, inner: Tensor, down: Tensor
) -> Tensor:
    factors = _scaled(outer, up), inner.to(down.dtype).unsqueeze(1) * down
    return weight.addmm_(*factors) if may_overwrite else torch.addmm(weight, *factors)
