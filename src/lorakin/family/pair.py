"""The common form of every change: a low-rank pair beside a weight, perhaps with a gain over both.

    W  =  diag(gain) · (W0 + up · down)       up: (out, k)   down: (k, in)   gain: (out,) or absent

Merging, files, counts, norms and pictures are written once, for `Pair`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""A module's tensors by slot. Modules that share a tensor hold the same object."""
LEAST_GAIN = torch.finfo(torch.float32).eps
"""The smallest gain that `Pair.times` returns."""


class Shape(NamedTuple):
    """The shape of a weight as a matrix, outputs × inputs, whatever the module's own layout.

    A convolution's `inputs` are its input channels times its kernel. A `lookup` (an embedding)
    picks columns instead of multiplying; its `inputs` are the vocabulary.
    """

    outputs: int
    inputs: int
    lookup: bool = False


class Pair(NamedTuple):
    """The change of one weight: `up` (outputs, k), `down` (k, inputs), `gain` (outputs,) or None.

    Scales such as alpha/rank are part of `up`.

    >>> pair = Pair(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0]]))
    >>> pair.applied_to(torch.eye(2))
    tensor([[2., 0.],
            [2., 1.]])
    """

    up: Tensor
    down: Tensor
    gain: Tensor | None = None

    def applied_to(self, weight: Tensor) -> Tensor:
        """Returns diag(gain)·(W0 + up·down), (outputs, inputs), in the dtype of `weight`."""
        changed = torch.addmm(weight, self.up.to(weight.dtype), self.down.to(weight.dtype))
        return changed if self.gain is None else self.gain.to(weight.dtype).unsqueeze(1) * changed

    def times(self, factor: float) -> Pair:
        """Returns the pair that changes a weight `factor` times as much: W0 + factor·(W − W0).

        With a gain g that is g' = 1 + factor·(g − 1) over W0 + (factor·g/g')·up·down. If g' is 0,
        float32's epsilon is used instead, which is below rounding.

        >>> pair = Pair(torch.ones(2, 1), torch.ones(1, 2), gain=torch.tensor([2.0, 4.0]))
        >>> pair.times(0.5).gain
        tensor([1.5000, 2.5000])
        """
        if factor == 1:
            return self
        if self.gain is None:
            return self._replace(up=factor * self.up)
        gain = 1 + factor * (self.gain - 1)
        gain = torch.where(gain.abs() < LEAST_GAIN, LEAST_GAIN, gain)
        return Pair((factor * self.gain / gain).unsqueeze(1) * self.up, self.down, gain)

    def norm(self) -> float:
        """Returns the Frobenius norm of up·down, without forming the product."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


class ScaledPair(NamedTuple):
    """A pair and the factor of its product: diag(gain) · (W0 + scale · up · down).

    The scale stands beside `up`, so that `up` is the parameter itself, which an optimizer trains.
    """

    pair: Pair
    scale: float = 1.0

    def times(self, factor: float) -> ScaledPair:
        """Returns the pair that changes a weight `factor` times as much."""
        if self.pair.gain is None:
            return ScaledPair(self.pair, self.scale * factor)
        return ScaledPair(self.pair.times(factor), self.scale)
