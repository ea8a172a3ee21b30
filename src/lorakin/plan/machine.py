"""How fast a machine runs operations on tensors."""

from __future__ import annotations

import dataclasses
import functools
import timeit
from collections.abc import Callable

import torch
from torch.nn.functional import silu


@dataclasses.dataclass(frozen=True)
class Machine:
    """A simple model of speed: dispatch, and then the longer of arithmetic and memory traffic.

    Attributes:
        flops: floating-point operations per second of large matrix products.
        bandwidth: bytes read and written per second.
        dispatch: seconds before an operation begins.
    """

    flops: float
    bandwidth: float
    dispatch: float

    def seconds(self, flops: int, moved: int) -> float:
        """Returns the time of one operation.

        >>> Machine(flops=1e9, bandwidth=1e9, dispatch=0.0).seconds(flops=2_000_000, moved=1_000)
        0.002

        Args:
            flops: its multiplications and additions.
            moved: bytes that it reads and writes.
        """
        return self.dispatch + max(flops / self.flops, moved / self.bandwidth)


ASSUMED_GPU = Machine(flops=2e14, bandwidth=1.5e12, dispatch=5e-6)
"""The speed that is assumed of every GPU, about an A100's."""
DISPATCH = 8e-6
"""The seconds of dispatch on a CPU, with Python's part in autograd functions."""


@functools.cache
def machine(device: str, dtype: torch.dtype) -> Machine:
    """Returns how fast `device` is with `dtype`: a CPU is measured in about 0.1 s, a GPU assumed.

    Args:
        device: "cpu" or "cuda".
        dtype: the dtype of the model.
    """
    if device != "cpu":
        return ASSUMED_GPU
    x, weight, thin = (
        torch.ones(shape, dtype=dtype) for shape in ((1024, 576), (576, 1536), (576, 16))
    )
    product = _least_seconds(lambda: x @ weight)

    # These move x three times, twice and once.
    passes = (lambda: x * x, lambda: silu(x), lambda: x @ thin)
    moved = 6 * x.numel() * dtype.itemsize / sum(map(_least_seconds, passes))
    return Machine(2 * x.numel() * weight.shape[1] / product, moved, DISPATCH)


def _least_seconds(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=1, repeat=20))
