"""A weight and its low-rank changes as one tensor that is never formed.

    W = W0 + left·right        left: (…, rows, r)   right: (…, r, cols)
    x·W = x·W0 + (x·left)·right

A module with its own way to multiply by its weights, as experts have, keeps its forward: it gets a
`ChangedWeight` for the weight, and its products become products with the parts. No copy of the
weights lives from the forward to the backward. What cannot be computed from the parts is computed
from W, which is formed for that.
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

MatrixProduct = Callable[..., Tensor]

PRODUCTS = frozenset({"matmul", "__matmul__", "mm", "bmm"})
GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Products of tokens, sorted by expert, with a stack of matrices; the last is transformers' own."""
TRANSPOSITIONS = frozenset({"transpose", "mT", "T", "t"})


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """What one adapter does to a weight: it adds left·right and multiplies each output by a gain.

    Attributes:
        left: (…, rows, r).
        right: (…, r, cols).
        gain: (…, outputs) or None.
        gain_weight: the weight that the gain multiplies, if that is not `ChangedWeight.weight`.
        dropout: the probability of zeroing an entry of this change's input.
    """

    left: Tensor
    right: Tensor
    gain: Tensor | None
    gain_weight: Tensor | None
    dropout: float = 0.0

    def select_matrices(self, which: Any) -> WeightChange:
        """Returns the change of some matrices of a stack."""
        gain, gain_weight = (
            None if part is None else part[which] for part in (self.gain, self.gain_weight)
        )
        return WeightChange(self.left[which], self.right[which], gain, gain_weight, self.dropout)

    def transposed(self) -> WeightChange:
        """Returns the change of the transposed weight."""
        gain_weight = None if self.gain_weight is None else self.gain_weight.mT
        return dataclasses.replace(
            self, left=self.right.mT, right=self.left.mT, gain_weight=gain_weight
        )


class ScaledRows(torch.autograd.Function):
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
        gain_of_row = gain if which is None else gain[which]
        products = grad.to(gain.dtype) * x
        if which is None:
            for_gain = products.sum_to_size(gain.shape)
        else:
            for_gain = torch.zeros_like(gain).index_add_(0, which, products)
        return (grad * gain_of_row).to(x.dtype), for_gain, None


class ChangedWeight(UnformedWeight):
    """`weight` (…, rows, cols) with `changes`.

    With `by_columns` inputs are multiplied by the columns (rows are outputs), else by the rows.

    >>> change = WeightChange(torch.ones(2, 1), torch.ones(1, 2), gain=None, gain_weight=None)
    >>> torch.ones(1, 2) @ ChangedWeight(torch.eye(2), (change,)).mT
    tensor([[3., 3.]])
    """

    weight: Tensor
    changes: Any  # tuple[WeightChange, ...]
    by_columns: bool
    address_refused: ClassVar[str] = (
        "these experts are run by a kernel that takes their weights by address, and so would miss "
        "the adapter; choose another, for example with "
        "model.set_experts_implementation('grouped_mm')"
    )

    @staticmethod
    def __new__(
        cls: type[ChangedWeight],
        weight: Tensor,
        changes: tuple[WeightChange, ...],
        by_columns: bool = True,
    ) -> ChangedWeight:
        changed = cls.shaped_like(weight)
        changed.weight, changed.changes, changed.by_columns = weight, changes, by_columns
        return changed

    def formed(self) -> Tensor:
        """Computes the changed weight; see the function `formed`."""
        return formed(self.weight, self.changes, self.by_columns)

    def select_matrices(self, which: Any) -> ChangedWeight:
        """Returns one matrix of a stack (experts, rows, cols), or those that a vector picks."""
        changes = tuple(change.select_matrices(which) for change in self.changes)
        return ChangedWeight(self.weight[which], changes, self.by_columns)

    def transposed(self) -> ChangedWeight:
        """Returns it with the last two dimensions exchanged."""
        changes = tuple(change.transposed() for change in self.changes)
        return ChangedWeight(self.weight.mT, changes, not self.by_columns)

    def multiplied(
        self, product: MatrixProduct, x: Tensor, offsets: Tensor | None = None
    ) -> Tensor:
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
            without_pair = base
            if dropped is not x or change.gain_weight is not None:
                weight = self.weight if change.gain_weight is None else change.gain_weight
                without_pair = product(dropped, weight)
            scaled = ScaledRows.apply(without_pair + low, gain, which)  # type: ignore[no-untyped-call]
            out = scaled if out is without_pair else out + (scaled - without_pair)
        return out

    @classmethod
    def compute_from_parts(
        cls, name: str, func: MatrixProduct, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        first, second, third = (*args, None, None, None)[:3]
        if isinstance(first, ChangedWeight):
            return _from_the_weight(name, func, first, args[1:])
        if name == "embedding" and isinstance(second, ChangedWeight):
            return _rows_of(second, first, kwargs.get("padding_idx", third))
        if not isinstance(second, ChangedWeight) or first.dim() < 2:
            return None
        if name == "linear":
            bias = kwargs.get("bias", third)
            out = second.transposed().multiplied(torch.matmul, first) if second.by_columns else None
            return out if out is None or bias is None else out + bias
        if second.by_columns:
            # This product sums over the outputs, so a gain cannot be applied afterwards.
            return None
        if name in GROUPED and kwargs.get("bias") is None and kwargs.get("out_dtype") is None:
            offsets = kwargs.get("offs", third)
            return second.multiplied(
                lambda x, weight: func(x, weight, offs=offsets), first, offsets
            )
        return second.multiplied(func, first) if name in PRODUCTS and "out" not in kwargs else None


class ReadableWeight(ChangedWeight):
    """A changed weight that may also be passed to an autograd function.

    Such a function returns a gradient of the whole weight, which `ReadableWeightFunction` passes on
    to the adapters' tensors. The changes are made only when something computes with them, since
    most code that reads a weight asks for its dtype.
    """

    make: Callable[[], tuple[WeightChange, ...]]
    with_gradients: tuple[WeightChange, ...] | None

    @property
    def changes(self) -> tuple[WeightChange, ...]:
        """The changes, made again without gradients: those made with gradients are kept apart."""
        if torch.is_grad_enabled():
            if self.with_gradients is None:
                self.with_gradients = self.make()
            return self.with_gradients
        return self.make()


class ReadableWeightFunction(torch.autograd.Function):
    """Makes a `ReadableWeight` the output of a function of the adapters' tensors, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        make: Callable[[], tuple[WeightChange, ...]],
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
        inputs = [tensor for tensor, needs_it in zip(tensors, needs, strict=True) if needs_it]
        gradients: Sequence[Tensor | None] = ()
        if inputs:
            with torch.enable_grad():
                changed = formed(weight.detach(), ctx.make(), ctx.by_columns)
            gradients = torch.autograd.grad(changed, inputs, grad, allow_unused=True)
        next_gradient = iter(gradients)
        for_weight = grad if ctx.needs_input_grad[0] else None
        for_tensors = (next(next_gradient) if needs_it else None for needs_it in needs)
        return for_weight, None, None, *for_tensors


def readable_weight(
    weight: Tensor,
    make: Callable[[], tuple[WeightChange, ...]],
    by_columns: bool,
    tensors: Sequence[Tensor],
) -> Tensor:
    """Returns `weight` with the changes that `make` makes of `tensors`, for any kind of reader.

    A compiler gets it formed at once.
    """
    if torch.compiler.is_compiling():
        return formed(weight, make(), by_columns)
    readable: ReadableWeight
    readable = ReadableWeightFunction.apply(weight, make, by_columns, *tensors)  # type: ignore[no-untyped-call]
    readable.weight, readable.by_columns = weight, by_columns
    readable.make, readable.with_gradients = make, None
    return readable


def formed(weight: Tensor, changes: Sequence[WeightChange], by_columns: bool) -> Tensor:
    """Computes `weight` with the changes in it, differentiable in both.

    Raises:
        StateError: a change has dropout, which acts on what the weight is multiplied by.

    >>> change = WeightChange(torch.ones(2, 1), torch.ones(1, 2), gain=None, gain_weight=None)
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
            gain_weight = weight if change.gain_weight is None else change.gain_weight
            low = ((gain - 1) * gain_weight + gain * low).to(weight.dtype)
        total = total + low
    return total


def _expert_of(x: Tensor, offsets: Tensor) -> Tensor:
    """Returns (tokens,): the expert of each row of x (tokens, inputs)."""
    rows = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True).clamp(max=len(offsets) - 1)


def _from_the_weight(
    name: str, func: MatrixProduct, weight: ChangedWeight, others: Sequence[Any]
) -> Tensor | None:
    """Computes a function whose first argument is the weight: an index, a transpose, or W·y."""
    second = others[0] if others else None
    if name == "__getitem__":
        is_selection = weight.dim() == 3 and _selects_matrices(second)
        return weight.select_matrices(second) if is_selection else None
    if name in TRANSPOSITIONS:
        return weight.transposed() if _exchanges_last_two(name, weight, others) else None
    if not isinstance(second, Tensor) or second.dim() < 2:
        return None
    if name in PRODUCTS and weight.by_columns:
        return weight.transposed().multiplied(func, second.mT).mT  # W·y = (yᵀ·Wᵀ)ᵀ
    return None


def _rows_of(weight: ChangedWeight, rows: Tensor, padding: int | None) -> Tensor | None:
    """Looks rows up in a changed table; None if it is transposed: its gain is for whole rows."""
    if weight.by_columns:
        return None
    out = base = F.embedding(rows, weight.weight, padding)
    for change in weight.changes:
        low = F.embedding(rows, change.left, padding) @ change.right
        if change.gain is not None:
            without_pair = base
            if change.gain_weight is not None:
                without_pair = F.embedding(rows, change.gain_weight, padding)
            low = ((change.gain - 1) * without_pair + change.gain * low).to(base.dtype)
        out = out + low
    return out


def _selects_matrices(index: object) -> bool:
    """Returns whether an index selects whole matrices of a stack: a number, or a vector of them."""
    if isinstance(index, Tensor):
        return index.dim() < 2 and not index.is_floating_point() and index.dtype is not torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _exchanges_last_two(name: str, weight: Tensor, dims: Sequence[Any]) -> bool:
    """Returns whether a transposition exchanges the last two dimensions."""
    if name == "transpose":
        last = {weight.dim() - 2, weight.dim() - 1}
        return len(dims) == 2 and {dim % weight.dim() for dim in dims} == last
    return name == "mT" or weight.dim() == 2
