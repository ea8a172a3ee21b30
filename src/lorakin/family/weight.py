"""Frozen weights: what members may ask of a base weight, a few rows at a time if it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorakin.family.precision import wide_dtype

BLOCK = 1 << 20
"""How many elements of a weight are processed at a time."""


RowNorms = Callable[[Tensor, Tensor, Tensor, float], Tensor | None]


class FrozenWeight:
    """A frozen weight as a matrix (outputs, inputs), and what DoRA's norm needs of it.

    A quantised weight (`inject/quantised.py`) is dequantised at each request, so ask for as few
    rows as possible.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    @property
    def matrix(self) -> Tensor:
        """The whole matrix."""
        return self._matrix

    @cached_property
    def squares(self) -> Tensor:
        """‖w_j‖² of every row j, (outputs,), in float32 at least; computed once."""
        dtype = wide_dtype(self.dtype)
        norms = [torch.linalg.vector_norm(rows.to(dtype), dim=1) for rows in self.blocks()]
        return torch.cat(norms).square()

    def blocks(self) -> Iterable[Tensor]:
        """Returns its rows in order, `BLOCK` elements at a time."""
        return blocks(self.matrix)

    def product(self, down: Tensor) -> Tensor:
        """Returns W0·downᵀ (outputs, k), in the dtype in which the forward multiplies."""
        return self.matrix @ down.to(self.dtype).T

    row_norm_kernels: ClassVar[list[RowNorms]] = []
    """Faster ways to `changed_row_norms`, which kernels/ adds; None where one does not apply."""

    def changed_row_norms(self, up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
        """Returns ‖w_j + scale·up_j·down‖ of every row j, (outputs,), in float32 at least.

        It forms the sum, and decides nothing by values, for which a GPU would have to wait.
        """
        up, down = up.to(self.dtype), down.to(self.dtype)
        for kernel in self.row_norm_kernels:
            if (by_kernel := kernel(self.matrix, up, down, scale)) is not None:
                return by_kernel
        formed = torch.addmm(self.matrix, up, down, alpha=scale)
        norms: Tensor = torch.linalg.vector_norm(formed, dim=1, dtype=wide_dtype(self.dtype))
        return norms

    def rows(self, mask: Tensor) -> Tensor:
        """Returns the rows that a mask (outputs,) selects."""
        return self.matrix[mask]


def blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows of `matrix`, `BLOCK` elements at a time."""
    return torch.split(matrix, max(1, BLOCK // max(1, matrix.shape[1])))


def has_no_values(weight: Tensor | FrozenWeight) -> bool:
    """Returns whether it has only a shape: it is on the meta device, or is a fake tensor."""
    tensor = weight if isinstance(weight, Tensor) else getattr(weight, "_matrix", None)
    return weight.device.type == "meta" or isinstance(tensor, FakeTensor)
