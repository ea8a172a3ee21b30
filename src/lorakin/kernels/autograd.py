"""What all autograd functions here share: when they apply, how their backwards run, and how they see that a tensor changed."""

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

PLAIN = (
    Tensor,
    nn.Parameter,
    FakeTensor,
)  # the last, without numbers, go wherever plain tensors go


def plainly() -> bool:
    """Whether calls are run as they come: not compiled, traced or transformed."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def backward_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward that is not differentiated itself and keeps to the dtypes of its forward, also under autocast."""

    @functools.wraps(function)
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not torch.is_autocast_enabled(grad.device.type):
            return function(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return function(ctx, grad)

    return once_differentiable(backward)


class Steps:
    """How many steps optimizers have taken in this process since there are adapters."""

    taken = 0


STEPS = Steps()


class Version:
    """Tensors as they were, to tell whether they still are that: their storages (not kept alive), places there, and changes.

    Autograd counts changes, but not those of torch's fused optimizers, so any optimizer's step in the process is one too. Nor
    does it count what is written through `.data`: an adapter's tensors should not be remembered by this alone (see `Copied`).
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]  # type: ignore[no-untyped-call]
        self.form = self._form(tensors)

    @staticmethod
    def _form(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
        return [(t.data_ptr(), t._version, STEPS.taken, t.dtype, t.shape) for t in tensors]

    @classmethod
    def of(cls, *tensors: Tensor) -> Version | None:
        """The tensors as they are; None if one cannot tell when they change."""
        return None if any(tensor.is_inference() for tensor in tensors) else cls(*tensors)

    def is_still(self, *tensors: Tensor) -> bool:
        """Whether `tensors` are what was seen."""
        if any(tensor.is_inference() for tensor in tensors) or self.form != self._form(tensors):
            return False
        return not any(storage.expired() for storage in self.storages)  # type: ignore[no-untyped-call]


class Copied:
    """The numbers of a few small tensors, to tell whether they still are those.

    Unlike `Seen` it notices what is written through `.data`, as moving averages do. On CPUs alone:
    elsewhere to compare is to wait for the device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.copies = [tensor.detach().clone() for tensor in tensors]

    @classmethod
    def of(cls, *tensors: Tensor) -> Copied | None:
        """The tensors as they are; None where they cannot be compared."""
        return cls(*tensors) if all(tensor.device.type == "cpu" for tensor in tensors) else None

    def is_still(self, *tensors: Tensor) -> bool:
        """Whether `tensors` hold the same numbers."""
        return len(tensors) == len(self.copies) and all(map(torch.equal, self.copies, tensors))
