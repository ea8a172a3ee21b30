"""Weights kept in few bits, as the kernels for linear layers multiply by them.

A kernel takes a `Weight`: a plain matrix, or a `WeightSource`, which unpacks one where a product
needs it. Autograd keeps nothing of a `WeightSource`: the backward unpacks again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lorakin.family import FrozenWeight

Unpack = Callable[[torch.dtype], Tensor]
"""A function of a dtype that returns a new matrix (outputs, inputs)."""
Product = Callable[[Tensor, Tensor | None], Tensor]
"""A function (x, bias) → W0 x + b of x (…, inputs), a new tensor that is not a view."""


class WeightSource(FrozenWeight):
    """A packed weight in one forward of its layer. `matrix` is unpacked once, if it is asked for.

    Args:
        packed: a plain tensor of its bits, which changes when the weight does.
        shape: of the matrix, (outputs, inputs).
        dtype: in which products are computed.
        unpack: makes the matrix. The backward calls it too, so it must not hold a `WeightSource`.
        product: the library's own product, for which no matrix may be needed.
        squares: computes ‖w_j‖² of every row j, (outputs,); see `FrozenWeight`.
        is_exact: whether `product` is that of the matrix, up to rounding.

    >>> tenths = torch.tensor([[10, 0], [0, 20]], dtype=torch.int8)
    >>> def unpack(dtype):
    ...     return tenths.to(dtype) / 10
    >>> source = WeightSource(
    ...     tenths, tenths.shape, torch.float32, unpack, lambda x, _: x @ unpack(x.dtype).T)
    >>> source.matrix
    tensor([[1., 0.],
            [0., 2.]])
    """

    def __init__(
        self,
        packed: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        unpack: Unpack,
        product: Product,
        squares: Callable[[], Tensor] | None = None,
        is_exact: bool = True,
    ) -> None:
        self.packed = packed
        self.shape, self.dtype, self.device = shape, dtype, packed.device
        self.product_of_library = product
        self.is_exact = is_exact
        self._unpack, self._squares = unpack, squares
        self._made: Tensor | None = None

    def to(self, dtype: torch.dtype) -> WeightSource:
        """Returns the weight for products in `dtype`."""
        if dtype == self.dtype:
            return self
        parts = (self._unpack, self.product_of_library, self._squares, self.is_exact)
        return WeightSource(self.packed, self.shape, dtype, *parts)

    @property
    def matrix(self) -> Tensor:
        """The matrix, in `dtype`."""
        if self._made is None:
            self._made = self._unpack(self.dtype)
        return self._made

    @property
    def matrix_at_hand(self) -> Tensor | None:
        """The matrix if it is unpacked already and gives the library's product."""
        return self._made if self.is_exact else None

    @functools.cached_property
    def squares(self) -> Tensor:
        """‖w_j‖² of every row j, (outputs,), in float32 at least."""
        return super().squares if self._squares is None else self._squares()

    def unpacker(self) -> Callable[[Tensor | None], Tensor]:
        """Returns a function that makes the matrix, without holding the one made already."""
        unpack, dtype = self._unpack, self.dtype
        return lambda _: unpack(dtype)


Weight = Tensor | WeightSource
"""What kernels multiply by: (outputs, inputs)."""


def kept_form(weight: Weight) -> tuple[Tensor | None, Callable[[Tensor], Tensor]]:
    """Returns what autograd keeps of a weight, and the function that makes the matrix of it.

    >>> kept, unpack = kept_form(torch.eye(2))
    >>> unpack(kept) is kept
    True
    """
    return (None, weight.unpacker()) if isinstance(weight, WeightSource) else (weight, _itself)


def tensor_of(weight: Weight) -> Tensor:
    """Returns the tensor that changes when the weight does.

    >>> tensor_of(torch.eye(1))
    tensor([[1.]])
    """
    return weight.packed if isinstance(weight, WeightSource) else weight


def _itself(weight: Tensor) -> Tensor:
    return weight
