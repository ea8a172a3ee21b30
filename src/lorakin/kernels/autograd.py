"""Shared by the autograd functions: when they apply, how backward runs, what was computed from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)
"""The types that the functions take. A FakeTensor has no values but passes like a plain tensor."""


def runs_eagerly() -> bool:
    """Returns whether torch runs eagerly: it does not compile, trace or transform calls.

    >>> runs_eagerly()
    True
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def is_capturing() -> bool:
    """Returns whether a CUDA graph captures what is computed now.

    Replays of the graph run its kernels alone, no Python: they read the same memory again, and a
    number that Python drew stays the same.

    >>> is_capturing()
    False
    """
    # A torch without CUDA cannot be asked.
    has_gpu: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return has_gpu and torch.cuda.is_current_stream_capturing()


def backward_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a backward that cannot be differentiated again.

    It runs with autocast off, so that it keeps to the dtypes of its forward.
    """

    @functools.wraps(function)
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None or not torch.is_autocast_enabled(grad.device.type):
            return function(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return function(ctx, grad)

    return once_differentiable(backward)


class StepCount:
    """Counts the steps that optimizers have taken in this process since it has adapters."""

    taken = 0


STEPS = StepCount()
"""The one count of the process: optimizer hooks increase it, `Version` reads it."""


class Version:
    """Remembers the state of tensors, to tell whether they have changed since.

    It compares storages (without keeping them alive), addresses, dtypes, shapes, and autograd's
    version counters. torch's fused optimizers do not count as changes there, so any optimizer step
    in the process counts as a change of a tensor that trains. Writing through `.data` is not
    noticed: use `Copied` for an adapter's tensors.

    >>> weight = torch.zeros(2)
    >>> seen = Version(weight)
    >>> seen.is_still(weight), seen.is_still(weight.add_(1))
    (True, False)
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]  # type: ignore[no-untyped-call]
        self.form = self._form(tensors)

    @staticmethod
    def _form(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
        return [(t.data_ptr(), t._version, _steps_of(t), t.dtype, t.shape) for t in tensors]

    @classmethod
    def of(cls, *tensors: Tensor) -> Version | None:
        """Returns the version of `tensors`; None if one was made in inference mode: it has none."""
        return None if any(tensor.is_inference() for tensor in tensors) else cls(*tensors)

    def is_still(self, *tensors: Tensor) -> bool:
        """Returns whether `tensors` have not changed."""
        if any(tensor.is_inference() for tensor in tensors) or self.form != self._form(tensors):
            return False
        return not any(storage.expired() for storage in self.storages)  # type: ignore[no-untyped-call]


def _steps_of(tensor: Tensor) -> int:
    """Returns the count of steps for a tensor that an optimizer may change; −1 for a frozen one."""
    return STEPS.taken if tensor.requires_grad or tensor.grad is not None else -1


class Copied:
    """Remembers the values of a few small tensors, to tell whether they still hold those.

    Unlike `Version` it notices what is written through `.data`, as moving averages are. It works on
    CPUs alone: elsewhere a comparison would wait for the device.

    >>> weight = torch.zeros(2)
    >>> seen = Copied(weight)
    >>> weight.data.add_(1)
    tensor([1., 1.])
    >>> seen.is_still(weight)
    False
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.copies = [tensor.detach().clone() for tensor in tensors]

    @classmethod
    def of(cls, *tensors: Tensor) -> Copied | None:
        """Returns copies of `tensors`; None if one is not on the CPU."""
        return cls(*tensors) if all(tensor.device.type == "cpu" for tensor in tensors) else None

    def is_still(self, *tensors: Tensor) -> bool:
        """Returns whether `tensors` hold the same values."""
        return len(tensors) == len(self.copies) and all(map(torch.equal, self.copies, tensors))
