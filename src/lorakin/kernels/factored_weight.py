"""A weight and its low-rank changes as one tensor that is never formed: products with it are made of products with its parts.

    W = W0 + left·right          left: (…, rows, r)   right: (…, r, cols)          x·W = x·W0 + (x·left)·right

Whatever else a kernel does with it happens to W itself, formed there and then. So a module that multiplies by its weights in
a way of its own, as experts do, keeps its own forward, and no copy of its weights lives from the forward to the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lorakin.errors import StateError
from lorakin.kernels.autograd import backward_once

Product = Callable[..., Tensor]

PRODUCTS = frozenset({"matmul", "__matmul__", "mm", "bmm"})
GROUPED = frozenset({"grouped_mm", "_grouped_mm", "grouped_mm_fallback"})
"""Of tokens sorted by expert with a stack of matrices; the last is transformers' own."""
TURNS = frozenset({"transpose", "mT", "T", "t"})
ABOUT_IT = frozenset(
    "shape dtype device layout ndim requires_grad is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_leaf grad grad_fn "
    "dim size stride numel nelement element_size is_floating_point is_complex __len__ __hash__ __repr__".split()
)
"""What is the same of the weight itself."""
ADDRESSES = frozenset({"data_ptr", "untyped_storage", "storage", "__dlpack__"})


@dataclasses.dataclass(frozen=True)
class Change:
    """What one adapter does to the weight: left·right, and a gain over both, for each of the outputs.

    `left` (…, rows, r), `right` (…, r, cols), `gain` (…, outputs) or None; `own` is the weight that the gain multiplies, where
    it is not `Changed.weight`; `dropout` the probability of zeroing an entry of this change's input.
    """

    left: Tensor
    right: Tensor
    gain: Tensor | None
    own: Tensor | None
    dropout: float = 0.0

    def picked(self, which: Any) -> Change:
        """That of some of the matrices."""
        gain, own = (None if part is None else part[which] for part in (self.gain, self.own))
        return Change(self.left[which], self.right[which], gain, own, self.dropout)

    def turned(self) -> Change:
        """That of the transposed weight."""
        own = None if self.own is None else self.own.mT
        return dataclasses.replace(self, left=self.right.mT, right=self.left.mT, own=own)


class Scaled(torch.autograd.Function):
    """Each row of x (rows, outputs) times its own of gains (n, outputs), in the dtype of x; no product is kept but x.

    `which` (rows,) says which gain; with None there is one for all.
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
        of_gain = (
            each.sum_to_size(gain.shape)
            if which is None
            else torch.zeros_like(gain).index_add_(0, which, each)
        )
        return (grad * by_row).to(x.dtype), of_gain, None


class Changed(Tensor):
    """`weight` (…, rows, cols) with changes, of which the columns, or else the rows, are what inputs are multiplied by."""

    weight: Tensor
    changes: Any  # tuple[Change, ...]
    by_columns: bool

    @staticmethod
    def __new__(
        cls: type[Changed], weight: Tensor, changes: tuple[Change, ...], by_columns: bool = True
    ) -> Changed:
        changed: Changed = Tensor._make_wrapper_subclass(
            cls,
            weight.shape,
            weight.stride(),
            dtype=weight.dtype,
            device=weight.device,
            layout=weight.layout,
        )
        changed.weight, changed.changes, changed.by_columns = weight, changes, by_columns
        return changed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of_function(func)
        if name in ABOUT_IT:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in ADDRESSES:
            raise StateError(
                "these experts are run by a kernel that takes their weights by address, past any adapter; choose another, with "
                "model.set_experts_implementation('grouped_mm'), say"
            )
        if (answer := _answer(name, func, args, kwargs)) is not None:
            return answer
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        formed_args, formed_kwargs = tree_map_only(Changed, Changed.formed, (args, kwargs or {}))
        return func(*formed_args, **formed_kwargs)

    def formed(self) -> Tensor:
        """The weight itself; see `formed`."""
        return formed(self.weight, self.changes, self.by_columns)

    def picked(self, which: Any) -> Changed:
        """Of a stack (experts, rows, cols) the one that a number selects, or those that a vector of numbers does."""
        return Changed(
            self.weight[which],
            tuple(change.picked(which) for change in self.changes),
            self.by_columns,
        )

    def turned(self) -> Changed:
        """Transposed in the last two dimensions."""
        return Changed(
            self.weight.mT, tuple(change.turned() for change in self.changes), not self.by_columns
        )

    def times(self, product: Product, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x·W for `product`, one of torch's; `offsets` say where in the rows of `x` each expert's end, if it is grouped."""
        out = base = product(x, self.weight)
        for change in self.changes:
            dropped = F.dropout(x, change.dropout) if change.dropout else x
            low = product(product(dropped, change.left), change.right)
            if change.gain is None:
                out = out + low
                continue
            gain = change.gain.unsqueeze(-2) if offsets is None else change.gain
            which = None if offsets is None else _expert_of(x, offsets)
            same = dropped is x and change.own is None
            own = (
                base
                if same
                else product(dropped, self.weight if change.own is None else change.own)
            )
            scaled = Scaled.apply(own + low, gain, which)  # type: ignore[no-untyped-call]
            out = scaled if out is own else out + (scaled - own)
        return out


class Read(Changed):
    """A changed weight that may also go where torch cannot look: into an autograd function.

    What computes with it through torch is answered by its parts, as ever. A function of autograd's
    gives back a gradient of the whole, which `Edge` passes on to the adapters' tensors. The changes
    are made when something computes: most who read a weight ask for its dtype.
    """

    make: Callable[[], tuple[Change, ...]]
    made: tuple[Change, ...] | None

    @property
    def changes(self) -> tuple[Change, ...]:
        """Made anew in each grad mode: what was made without gradients has none."""
        if torch.is_grad_enabled():
            if self.made is None:
                self.made = self.make()
            return self.made
        return self.make()


class ReadEdge(torch.autograd.Function):
    """A `Read` as autograd sees it: the output of a function of the adapters' tensors."""

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
        return Tensor._make_wrapper_subclass(
            Read, weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device
        )

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True) if needed]
        with torch.enable_grad():
            whole = formed(weight.detach(), ctx.make(), ctx.by_columns)
        found = iter(torch.autograd.grad(whole, wanted, grad, allow_unused=True) if wanted else ())
        own = grad if ctx.needs_input_grad[0] else None
        return own, None, None, *(next(found) if n else None for n in ctx.needs_input_grad[3:])


def read(
    weight: Tensor,
    make: Callable[[], tuple[Change, ...]],
    by_columns: bool,
    tensors: Sequence[Tensor],
) -> Tensor:
    """`weight` with the changes that `make` makes of `tensors`; formed at once for a compiler."""
    if torch.compiler.is_compiling():
        return formed(weight, make(), by_columns)
    whole: Read = ReadEdge.apply(weight, make, by_columns, *tensors)  # type: ignore[no-untyped-call]
    whole.weight, whole.make, whole.made, whole.by_columns = weight, make, None, by_columns
    return whole


def formed(weight: Tensor, changes: Sequence[Change], by_columns: bool) -> Tensor:
    """`weight` with the changes in it, differentiable in them; see `Changed`.

    Raises:
        StateError: one of them has dropout, which acts on what the weight is multiplied by.
    """
    total = weight
    for change in changes:
        if change.dropout:
            raise StateError(
                "dropout acts on what the experts' weights are multiplied by, and this model uses them in another way, or is "
                "compiled; give the adapter dropout=0, or leave its experts out"
            )
        low = change.left @ change.right
        if change.gain is not None:
            gain = change.gain.unsqueeze(-1 if by_columns else -2)
            own = weight if change.own is None else change.own
            low = ((gain - 1) * own + gain * low).to(weight.dtype)
        total = total + low
    return total


def _expert_of(x: Tensor, offsets: Tensor) -> Tensor:
    """Which expert each row of `x` (tokens, inputs) belongs to."""
    rows = torch.arange(len(x), device=x.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True).clamp(max=len(offsets) - 1)


def name_of_function(func: Any) -> str:
    """What is asked: the name of a function of torch's, of an operator without its overload, or of an attribute."""
    name = getattr(func, "__name__", str(func))
    return str(func.__self__.__name__) if name == "__get__" else name.split(".")[0]


def _answer(
    name: str, func: Product, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """What `func` makes of the parts; None for what needs the weight itself."""
    first, second, third = (*args, None, None, None)[:3]
    if isinstance(first, Changed):
        if name == "__getitem__":
            return first.picked(second) if first.dim() == 3 and _picks(second) else None
        if name in TURNS:
            return first.turned() if _last_two(name, first, args[1:]) else None
        if (
            name in PRODUCTS
            and first.by_columns
            and isinstance(second, Tensor)
            and second.dim() > 1
        ):
            return first.turned().times(func, second.mT).mT  # W·y = (yᵀ·Wᵀ)ᵀ
        return None
    if name == "embedding" and isinstance(second, Changed):
        return _picked(second, first, kwargs.get("padding_idx", third))
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


def _picked(weight: Changed, rows: Tensor, padding: int | None) -> Tensor | None:
    """The rows of a changed table; None if it is turned round, or a gain is for its rows."""
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
    """Whether an index selects whole matrices of a stack: a number, or a vector of numbers."""
    if isinstance(index, Tensor):
        return index.dim() < 2 and not index.is_floating_point() and index.dtype is not torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _last_two(name: str, weight: Tensor, dims: Sequence[Any]) -> bool:
    if name == "transpose":
        return len(dims) == 2 and {dim % weight.dim() for dim in dims} == {
            weight.dim() - 2,
            weight.dim() - 1,
        }
    return name == "mT" or weight.dim() == 2
