"""CUDA graphs, on a real GPU and on the pretended one.

A CUDA graph captures kernels, and replays them with the same numbers on the same memory, without
Python. On the pretended GPU the operations of torch are recorded and called again, and what a
capture refuses is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from gpu.kernel_count import KernelCount, tensors

IS_PRETENDED = torch.version.cuda is None


class Graph:
    """What a function computes on the GPU, captured once it has run `before` times.

    After `x = torch.zeros(2, device="cuda")`, `Graph(lambda: x.add_(1), before=0)` leaves x as it
    is, and each `replay()` adds 1.
    """

    def __init__(self, function: Callable[[], Any], before: int = 3) -> None:
        with contextlib.nullcontext() if IS_PRETENDED else _on_side_stream():
            for _ in range(before):
                function()
        self.graph: Any = Recorded() if IS_PRETENDED else torch.cuda.CUDAGraph()
        with self.graph if IS_PRETENDED else torch.cuda.graph(self.graph):
            self.result = function()

    def replay(self) -> None:
        """Runs the captured kernels again."""
        self.graph.replay()


class Recorded(KernelCount):
    """Records operations on the pretended GPU inside a `with` block, to run them again.

    As a capture does, it refuses to wait, and generators other than the devices' own. It undoes
    what the recorded operations wrote: a capture runs none of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Recorded:
        self.stack.enter_context(_capturing())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()
        for storage, copy in self.before.values():
            storage.copy_(copy)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [t for t in tensors((args, kwargs)) if t.is_cuda]
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Generator) and given.device.type == "cuda":
                raise RuntimeError("Attempt to increase offset for a generator not in capture mode")
        for tensor in operands if func._schema.is_mutable else ():
            whole = tensor.new_empty(0).set_(tensor.untyped_storage())
            if whole.data_ptr() not in self.made:
                self.before.setdefault(whole.data_ptr(), (whole, whole.clone()))
        waits = len(self.waits)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.waits) > waits:
            raise RuntimeError(
                f"operation not permitted when stream is capturing: {self.waits[-1]}"
            )
        results = list(tensors(out))
        if not func.is_view and any(t.is_cuda for t in (*operands, *results)):
            # a number on the CPU is a constant of the kernel
            constant = tree_map(_as_constant, (args, kwargs))
            self.calls.append((func, *constant, results))
            self.made |= {
                t.untyped_storage().data_ptr() for t in results if not _among(t, operands)
            }
        return out

    def replay(self) -> None:
        """Runs the recorded operations again, on the same memory."""
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                again = tensors(func(*args, **kwargs))
                for old, new in zip(results, again, strict=True):
                    if new is not old and new.data_ptr() != old.data_ptr():
                        old.detach().copy_(new)


@contextlib.contextmanager
def _on_side_stream() -> Iterator[None]:
    stream, outer = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def _among(tensor: Tensor, operands: list[Tensor]) -> bool:
    address = tensor.untyped_storage().data_ptr()
    return any(operand.untyped_storage().data_ptr() == address for operand in operands)


def _as_constant(value: Any) -> Any:
    is_on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
    return value.clone() if is_on_cpu else value


@contextlib.contextmanager
def _capturing() -> Iterator[None]:
    plain = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = plain
