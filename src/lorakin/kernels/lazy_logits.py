"""Logits that are not computed unless something other than a cross-entropy asks for them.

The logits of a batch, tokens × vocabulary, are its largest tensor, several times over in float32. A
loss needs one number per token, and the gradient goes no further than the hidden states. So the
head returns `LazyLogits`: a tensor with the shape of the logits but no storage. Views along the
tokens stay lazy. `cross_entropy` computes logits block by block, and the gradient of the hidden
states in the same pass. Anything else computes the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.autograd import backward_once
from lorakin.kernels.cross_entropy import are_targets, summed_cross_entropy


class LogitsFunction(torch.autograd.Function):
    """Makes `LazyLogits` the output of a function of h, for autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        shape = (*hidden.shape[:-1], len(weight))
        return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=hidden.device)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None, None


class LazyLogits(Tensor):
    """The logits W·h (…, vocabulary) of hidden states h (…, inputs), not yet computed.

    >>> logits = LazyLogits.of(torch.ones(2, 3), torch.ones(5, 3))
    >>> logits.shape, logits.logits is None
    (torch.Size([2, 5]), True)
    >>> logits.sum()
    tensor(30.)
    """

    hidden: Tensor
    weight: Tensor
    logits: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> LazyLogits:
        """Returns the logits of `hidden` with a head's weight (vocabulary, inputs).

        They are computed in the dtype of `hidden`, and then cast to `dtype`.
        """
        logits: LazyLogits = LogitsFunction.apply(hidden, weight, dtype or hidden.dtype)  # type: ignore[no-untyped-call]
        logits.hidden, logits.weight, logits.logits = hidden, weight, None
        return logits

    def computed(self) -> Tensor:
        """Computes the logits, once."""
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
        if function in READS or _attribute(function) in ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function in STAY_LAZY and isinstance(first, LazyLogits) and first.logits is None:
            lazy = STAY_LAZY[function](*args, **kwargs)
            if lazy is not None:
                return lazy
        result = function(*_computed(args), **_computed(kwargs))
        # The function wrote into the logits and returned them.
        if isinstance(first, LazyLogits) and result is first.logits:
            return first
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return function(*_computed(args), **_computed(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


def _attribute(function: Any) -> str | None:
    """Returns the name of the attribute that `function` reads, if that is what it does."""
    if function.__name__ != "__get__":
        return None
    return getattr(getattr(function, "__self__", None), "__name__", None)


def _computed(value: Any) -> Any:
    """Returns arguments with every `LazyLogits` in them computed."""
    if isinstance(value, LazyLogits):
        return value.computed()
    if isinstance(value, dict):
        return {key: _computed(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_computed(inner) for inner in value)
    return value


def _cast(logits: LazyLogits, dtype: Any = None, *others: Any, **more: Any) -> LazyLogits | None:
    simple = isinstance(dtype, torch.dtype) and dtype.is_floating_point and not others and not more
    return LazyLogits.of(logits.hidden, logits.weight, dtype) if simple else None


def _wide(logits: LazyLogits) -> LazyLogits:
    return LazyLogits.of(logits.hidden, logits.weight, torch.float32)


def _same(logits: LazyLogits) -> LazyLogits:
    return logits


def _viewed(logits: LazyLogits, *shape: Any) -> LazyLogits | None:
    is_one = len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size)
    sizes = list(shape[0] if is_one else shape)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    tokens, inputs = logits.hidden.shape[:-1].numel(), logits.hidden.shape[-1]
    keeps_vocabulary = sizes[-1] == logits.shape[-1]
    keeps_vocabulary |= sizes[-1] == -1 and math.prod(sizes[:-1]) == tokens
    if not keeps_vocabulary:
        return None
    return LazyLogits.of(logits.hidden.reshape(*sizes[:-1], inputs), logits.weight, logits.dtype)


def _flattened(logits: LazyLogits, start: int = 0, end: int = -1) -> LazyLogits | None:
    last = logits.dim() - 1
    if end % logits.dim() == last:
        return None
    return LazyLogits.of(logits.hidden.flatten(start, end), logits.weight, logits.dtype)


def _sliced(logits: LazyLogits, index: Any) -> LazyLogits | None:
    indices = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) or part is Ellipsis for part in indices):
        return None
    everything = slice(None)
    if Ellipsis in indices:
        position = indices.index(Ellipsis)
        missing = (everything,) * (logits.dim() - len(indices) + 1)
        indices = (*indices[:position], *missing, *indices[position + 1 :])
    if len(indices) == logits.dim() and indices[-1] != everything:
        return None
    return LazyLogits.of(logits.hidden[indices], logits.weight, logits.dtype)


def _cross_entropy(
    logits: Any,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if any(option is not None for option in (weight, size_average, reduce)) or label_smoothing:
        return None
    if reduction not in ("mean", "sum") or logits.dim() != 2:
        return None
    # A softmax in a narrow dtype is wanted.
    if logits.dtype != torch.promote_types(logits.hidden.dtype, torch.float32):
        return None
    # The targets are probabilities, or something for which torch has an error.
    if target.dim() != 1 or target.dtype != torch.int64 or len(target) != len(logits.hidden):
        return None
    classes = len(logits.weight)
    if target.device.type == "cpu" and not are_targets(target, classes, ignore_index).all():
        return None

    total = summed_cross_entropy(logits.hidden, logits.weight, target, ignore_index)
    return total / (target != ignore_index).sum() if reduction == "mean" else total


STAY_LAZY: dict[Any, Callable[..., Any]] = {
    Tensor.float: _wide,
    Tensor.to: _cast,
    Tensor.contiguous: _same,
    Tensor.view: _viewed,
    Tensor.reshape: _viewed,
    Tensor.flatten: _flattened,
    Tensor.__getitem__: _sliced,
    F.cross_entropy: _cross_entropy,
}
"""What to run instead of a function of torch; each returns None if the logits are needed."""
READS = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.element_size,
    Tensor.__len__,
}
"""Methods that need no values."""
ATTRIBUTES = frozenset(
    "shape ndim dtype device layout is_cuda is_sparse is_quantized is_meta requires_grad "
    "grad_fn".split()
)
"""Attributes that need no values."""
