"""Logits that are not made until something other than a cross-entropy asks for them.

The logits of a batch are its largest tensor: tokens × vocabulary, several times over in float32. A loss needs of them one
number a token, and their gradient goes no further than the hidden states. So the head gives a `Deferred`: a tensor with the
shape of the logits, without storage. Views along the tokens stay deferred; `cross_entropy` runs over it a block of tokens at
a time and computes the gradient of the hidden states in the same pass; anything else makes the logits, as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.autograd import backward_once

BLOCK = 1 << 22
"""Logits that are made at a time, of `ROWS` tokens at least."""
ROWS = 32


class CrossEntropy(torch.autograd.Function):
    """Σ −log softmax(W h)_target over the tokens that are not ignored, for h (tokens, in) and a frozen W (vocabulary, in).

    Logits are in the dtype of h, softmax in float32. Kept for backward is the gradient of h.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, ignored: int) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        rows, left_out = max(ROWS, BLOCK // len(weight)), (target == ignored).unsqueeze(1)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.T).to(wide)
            wanted = target[part].unsqueeze(1).masked_fill(left_out[part], 0)
            said, top = logits.gather(1, wanted), logits.amax(-1, keepdim=True)
            shares = logits.sub_(top).exp_()
            whole = shares.sum(-1, keepdim=True)
            total += (top + whole.log() - said).masked_fill_(left_out[part], 0).sum()
            if gradient is not None:
                shares.div_(whole).scatter_add_(1, wanted, torch.full_like(whole, -1))
                torch.mm(
                    shares.masked_fill_(left_out[part], 0).to(weight.dtype),
                    weight,
                    out=gradient[part],
                )
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.to(grad.dtype) * grad).to(gradient.dtype), None, None, None


class Head(torch.autograd.Function):
    """The logits as autograd sees them: whoever hands back a gradient of theirs reaches h."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        shape = (*hidden.shape[:-1], len(weight))
        return Tensor._make_wrapper_subclass(Deferred, shape, dtype=dtype, device=hidden.device)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None, None


class Deferred(Tensor):
    """The logits W·h (…, vocabulary) of hidden states h (…, in), not yet made."""

    hidden: Tensor
    weight: Tensor
    logits: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Deferred:
        """Those of `hidden` and a head's weight (vocabulary, in), later to be cast to `dtype`."""
        logits: Deferred = Head.apply(hidden, weight, dtype or hidden.dtype)  # type: ignore[no-untyped-call]
        logits.hidden, logits.weight, logits.logits = hidden, weight, None
        return logits

    def made(self) -> Tensor:
        """The logits, from now on these."""
        if self.logits is None:
            self.logits = F.linear(self.hidden, self.weight).to(self.dtype)
        return self.logits

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        attribute = (
            getattr(getattr(function, "__self__", None), "__name__", None)
            if function.__name__ == "__get__"
            else None
        )
        if function in READS or attribute in ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in KEPT and isinstance(first, Deferred) and first.logits is None:
            kept = KEPT[function](*args, **kwargs)
            if kept is not None:
                return kept
        result = function(*_made(args), **_made(kwargs))
        return (
            first if isinstance(first, Deferred) and result is first.logits else result
        )  # it was written into

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return function(*_made(args), **_made(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"


def _made(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.made()
    if isinstance(value, dict):
        return {key: _made(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_made(inner) for inner in value)
    return value


def _cast(logits: Deferred, dtype: Any = None, *others: Any, **more: Any) -> Deferred | None:
    simple = isinstance(dtype, torch.dtype) and dtype.is_floating_point and not others and not more
    return Deferred.of(logits.hidden, logits.weight, dtype) if simple else None


def _wide(logits: Deferred) -> Deferred:
    return Deferred.of(logits.hidden, logits.weight, torch.float32)


def _same(logits: Deferred) -> Deferred:
    return logits


def _viewed(logits: Deferred, *shape: Any) -> Deferred | None:
    sizes = list(
        shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
    )
    if (
        not sizes
        or sizes[-1] not in (-1, logits.shape[-1])
        or not all(isinstance(size, int) for size in sizes)
    ):
        return None
    if sizes[-1] == -1 and logits.hidden.numel() // logits.hidden.shape[-1] != math.prod(
        sizes[:-1]
    ):
        return None
    return Deferred.of(
        logits.hidden.reshape(*sizes[:-1], logits.hidden.shape[-1]), logits.weight, logits.dtype
    )


def _flattened(logits: Deferred, start: int = 0, end: int = -1) -> Deferred | None:
    last = logits.dim() - 1
    if end % logits.dim() == last:
        return None
    return Deferred.of(logits.hidden.flatten(start, end), logits.weight, logits.dtype)


def _sliced(logits: Deferred, index: Any) -> Deferred | None:
    indices = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) or part is Ellipsis for part in indices):
        return None
    whole = slice(None)
    if Ellipsis in indices:
        at = indices.index(Ellipsis)
        indices = indices[:at] + (whole,) * (logits.dim() - len(indices) + 1) + indices[at + 1 :]
    if len(indices) == logits.dim() and indices[-1] != whole:
        return None
    return Deferred.of(logits.hidden[indices], logits.weight, logits.dtype)


def _cross_entropy(
    logits: Any, target: Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = -100, reduce: Any = None,
    reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    usual = weight is None and size_average is None and reduce is None and not label_smoothing
    if (
        not usual
        or reduction not in ("mean", "sum")
        or logits.dim() != 2
        or target.dim() != 1
        or target.is_floating_point()
    ):
        return None
    if logits.dtype != torch.promote_types(
        logits.hidden.dtype, torch.float32
    ):  # a softmax in a narrow dtype was asked for
        return None
    if target.dtype != torch.int64 or len(target) != len(logits.hidden):
        return None  # torch has its own word on these
    wrong = ((target < 0) | (target >= len(logits.weight))) & (target != ignore_index)
    if target.device.type == "cpu" and bool(wrong.any()):
        return None
    total: Tensor = CrossEntropy.apply(logits.hidden, logits.weight, target, ignore_index)  # type: ignore[no-untyped-call]
    return total / (target != ignore_index).sum() if reduction == "mean" else total


KEPT: dict[Any, Callable[..., Any]] = {
    Tensor.float: _wide,
    Tensor.to: _cast,
    Tensor.contiguous: _same,
    Tensor.view: _viewed,
    Tensor.reshape: _viewed,
    Tensor.flatten: _flattened,
    Tensor.__getitem__: _sliced,
    F.cross_entropy: _cross_entropy,
}
"""What stays deferred, by function; each gives None for what it cannot keep."""
READS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.element_size,
    Tensor.__len__,
}
ATTRIBUTES = {
    "shape", "ndim", "dtype", "device", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta", "requires_grad", "grad_fn",
}  # fmt: skip
"""What needs no values, methods and attributes."""
