"""A weight and its low-rank changes as one tensor that is never formed.

    W = W0 + left·right        left: (…, rows, r)   right: (…, r, cols)
    x·W = x·W0 + (x·left)·right

A module that multiplies by its weights in a way of its own, as experts do, keeps its own forward:
it is given a `Changed` for the weight, and its products become products with the parts. No copy of
the weights lives from the forward to the backward. What cannot be computed from the parts is
computed from W, formed there and then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.errors import StateError
from lorakin.kernels.autograd import backward_once
from lorakin.kernels.unformed_weight import UnformedWeight

Product = Callable[..., Tensor]

PRODUCTS = frozenset({"matmul", "__matmul__", "mm", "bmm"})
GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Products of tokens, sorted by expert, with a stack of matrices; the last is transformers' own."""
TURNS = frozenset({"transpose", "mT", "T", "t"})


@dataclasses.dataclass(frozen=True)
class Change:
    """What one adapter does to a weight: it adds left·right and multiplies each output by a gain.

    Attributes:
        left: (…, rows, r).
        right: (…, r, cols).
        gain: (…, outputs) or None.
        own: the weight that the gain multiplies, if that is not `Changed.weight`.
        dropout: the probability of zeroing an entry of this change's input.
    """

    left: Tensor
    right: Tensor
    gain: Tensor | None
    own: Tensor | None
    dropout: float = 0.0

    def picked(self, which: Any) -> Change:
        """Returns the change of some matrices of a stack."""
        gain, own = (None if part is None else part[which] for part in (self.gain, self.own))
        return Change(self.left[which], self.right[which], gain, own, self.dropout)

    def turned(self) -> Change:
        """Returns the change of the transposed weight."""
        own = None if self.own is None else self.own.mT
        return dataclasses.replace(self, left=self.right.mT, right=self.left.mT, own=own)


class Scaled(torch.autograd.Function):
    """Multiplies each row of x (rows, outputs) by a gain, and keeps nothing but x.

    `gain` is (n, outputs), and `which` (rows,) says which of them a row takes; None if there is one
    for all. The result has the dtype of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, which: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gain, which)
        return (x * (gain if which is None else gain[which])).to(x.dtype)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, which = ctx.saved_tensors
        by_row = gain if which is None else gain[which]
        each = grad.to(gain.dtype) * x
        if which is None:
            for_gain = each.sum_to_size(gain.shape)
        else:
            for_gain = torch.zeros_like(gain).index_add_(0, which, each)
        return (grad * by_row).to(x.dtype), for_gain, None


class Changed(UnformedWeight):
    """`weight` (…, rows, cols) with `changes`.

    With `by_columns` inputs are multiplied by the columns (rows are outputs), else by the rows.

    >>> change = Change(torch.ones(2, 1), torch.ones(1, 2), gain=None, own=None)
    >>> torch.ones(1, 2) @ Changed(torch.eye(2), (change,)).mT
    tensor([[3., 3.]])
    """

    weight: Tensor
    changes: Any  # tuple[Change, ...]
    by_columns: bool
    address_refused: ClassVar[str] = (
        "these experts are run by a kernel that takes their weights by address, and so would miss "
        "the adapter; choose another, for example with "
        "model.set_experts_implementation('grouped_mm')"
    )

    @staticmethod
    def __new__(
        cls: type[Changed], weight: Tensor, changes: tuple[Change, ...], by_columns: bool = True
    ) -> Changed:
        changed = cls.shaped_like(weight)
        changed.weight, changed.changes, changed.by_columns = weight, changes, by_columns
        return changed

    def formed(self) -> Tensor:
        """Computes the changed weight; see the function `formed`."""
        return formed(self.weight, self.changes, self.by_columns)

    def picked(self, which: Any) -> Changed:
        """Returns one matrix of a stack (experts, rows, cols), or those of a vector of numbers."""
        changes = tuple(change.picked(which) for change in self.changes)
        return Changed(self.weight[which], changes, self.by_columns)

    def turned(self) -> Changed:
        """Returns it with the last two dimensions exchanged."""
        changes = tuple(change.turned() for change in self.changes)
        return Changed(self.weight.mT, changes, not self.by_columns)

    def times(self, product: Product, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Computes x·W with `product`, one of torch's.

        A grouped product has `offsets`: where each expert's rows of x end.
        """
        out = base = product(x, self.weight)
        for change in self.changes:
            dropped = F.dropout(x, change.dropout) if change.dropout else x
            low = product(product(dropped, change.left), change.right)
            if change.gain is None:
                out = out + low
                continue
            gain = change.gain.unsqueeze(-2) if offsets is None else change.gain
            which = None if offsets is None else _expert_of(x, offsets)
            own = base
            if dropped is not x or change.own is not None:
                own = product(dropped, self.weight if change.own is None else change.own)
            scaled = Scaled.apply(own + low, gain, which)  # type: ignore[no-untyped-call]
            out = scaled if out is own else out + (scaled - own)
        return out

    @classmethod
    def answer(
        cls, name: str, func: Product, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        first, second, third = (*args, None, None, None)[:3]
        if isinstance(first, Changed):
            return _of_the_weight(name, func, first, args[1:])
        if name == "embedding" and isinstance(second, Changed):
            return _rows_of(second, first, kwargs.get("padding_idx", third))
        if not isinstance(second, Changed) or first.dim() < 2:
            return None
        if name == "linear":
            bias = kwargs.get("bias", third)
            out = second.turned().times(torch.matmul, first) if second.by_columns else None
            return out if out is None or bias is None else out + bias
        if second.by_columns:  # a product that sums over what a gain is for
            return None
        if name in GROUPED and kwargs.get("bias") is None and kwargs.get("out_dtype") is None:
            offsets = kwargs.get("offs", third)
            return second.times(lambda x, weight: func(x, weight, offs=offsets), first, offsets)
        return second.times(func, first) if name in PRODUCTS and "out" not in kwargs else None


class ReadableWeight(Changed):
    """A changed weight that may also go where torch cannot look: into an autograd function.

    Such a function hands back a gradient of the whole weight, which `ReadableEdge` passes on to the
    adapters' tensors. The changes are made only when something computes with them, since most
    readers of a weight ask for its dtype.
    """

    make: Callable[[], tuple[Change, ...]]
    made: tuple[Change, ...] | None

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes, made again without gradients: those made with gradients are kept apart."""
        if torch.is_grad_enabled():
            if self.made is None:
                self.made = self.make()
            return self.made
        return self.make()


class ReadableEdge(torch.autograd.Function):
    """Makes a `ReadableWeight` the output of a function of the adapters' tensors, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        make: Callable[[], tuple[Change, ...]],
        by_columns: bool,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.make, ctx.by_columns = make, by_columns
        ctx.save_for_backward(weight, *tensors)
        return ReadableWeight.shaped_like(weight)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        wanted = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
        with torch.enable_grad():
            whole = formed(weight.detach(), ctx.make(), ctx.by_columns)
        found = iter(torch.autograd.grad(whole, wanted, grad, allow_unused=True) if wanted else ())
        own = grad if ctx.needs_input_grad[0] else None
        return own, None, None, *(next(found) if needed else None for needed in needs)


def read(
    weight: Tensor,
    make: Callable[[], tuple[Change, ...]],
    by_columns: bool,
    tensors: Sequence[Tensor],
) -> Tensor:
    """Returns `weight` with the changes that `make` makes of `tensors`, for any kind of reader.

    A compiler gets it formed at once.
    """
    if torch.compiler.is_compiling():
        return formed(weight, make(), by_columns)
    whole: ReadableWeight = ReadableEdge.apply(weight, make, by_columns, *tensors)  # type: ignore[no-untyped-call]
    whole.weight, whole.make, whole.made, whole.by_columns = weight, make, None, by_columns
    return whole


def formed(weight: Tensor, changes: Sequence[Change], by_columns: bool) -> Tensor:
    """Computes `weight` with the changes in it, differentiable in both.

    Raises:
        StateError: a change has dropout, which acts on what the weight is multiplied by.

    >>> change = Change(torch.ones(2, 1), torch.ones(1, 2), gain=None, own=None)
    >>> formed(torch.eye(2), [change], by_columns=True)
    tensor([[2., 1.],
            [1., 2.]])
    """
    total = weight
    for change in changes:
        if change.dropout:
            raise StateError(
                "dropout acts on what the experts' weights are multiplied by, but this model uses "
                "them in another way, or is compiled; give the adapter dropout=0, or leave its "
                "experts out"
            )
        low = change.left @ change.right
        if change.gain is not None:
            gain = change.gain.unsqueeze(-1 if by_columns else -2)
            own = weight if change.own is None else change.own
            low = ((gain - 1) * own + gain * low).to(weight.dtype)
        total = total + low
    return total


def _expert_of(x: Tensor, offsets: Tensor) -> Tensor:
    """Returns (tokens,): the expert of each row of x (tokens, inputs)."""
    rows = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True).clamp(max=len(offsets) - 1)


def _of_the_weight(
    name: str, func: Product, weight: Changed, others: Sequence[Any]
) -> Tensor | None:
    """Computes a function whose first argument is the weight: an index, a transpose, or W·y."""
    second = others[0] if others else None
    if name == "__getitem__":
        return weight.picked(second) if weight.dim() == 3 and _picks(second) else None
    if name in TURNS:
        return weight.turned() if _last_two(name, weight, others) else None
    if not isinstance(second, Tensor) or second.dim() < 2:
        return None
    if name in PRODUCTS and weight.by_columns:
        return weight.turned().times(func, second.mT).mT  # W·y = (yᵀ·Wᵀ)ᵀ
    return None


def _rows_of(weight: Changed, rows: Tensor, padding: int | None) -> Tensor | None:
    """Looks rows up in a changed table; None if it is transposed: a gain is for its rows then."""
    if weight.by_columns:
        return None
    out = base = F.embedding(rows, weight.weight, padding)
    for change in weight.changes:
        low = F.embedding(rows, change.left, padding) @ change.right
        if change.gain is not None:
            own = base if change.own is None else F.embedding(rows, change.own, padding)
            low = ((change.gain - 1) * own + change.gain * low).to(base.dtype)
        out = out + low
    return out


def _picks(index: object) -> bool:
    """Returns whether an index selects whole matrices of a stack: a number, or a vector of them."""
    if isinstance(index, Tensor):
        return index.dim() < 2 and not index.is_floating_point() and index.dtype is not torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _last_two(name: str, weight: Tensor, dims: Sequence[Any]) -> bool:
    """Returns whether a transposition exchanges the last two dimensions."""
    if name == "transpose":
        last = {weight.dim() - 2, weight.dim() - 1}
        return len(dims) == 2 and {dim % weight.dim() for dim in dims} == last
    return name == "mT" or weight.dim() == 2
