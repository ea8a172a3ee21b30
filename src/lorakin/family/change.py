"""The forms that a member's change of a weight can take.

| form | change | members |
|---|---|---|
| `LowRank` | scale · up · down | all but VeRA |
| `Chain` | diag(outer) · up · diag(inner) · down, up and down frozen | VeRA |

Every form can also be written as a `Pair`, with the scale in `up`. A gain multiplies the result
(`Member.gain`); constant changes are added (`Modifier.beside_pair`). `Method` lists what of these
it returns to whom.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorakin.family.pair import Pair, Shape


class LowRank(NamedTuple):
    """scale · up · down, with `up` (outputs, k) and `down` (k, inputs) as the optimizer trains.

    The scale stays outside, so that `up` is the parameter itself, which an optimizer trains.

    >>> import torch
    >>> change = LowRank(torch.ones(3, 1), torch.ones(1, 2), scale=2.0)
    >>> change.pair(Shape(outputs=3, inputs=2)).up.flatten().tolist()
    [2.0, 2.0, 2.0]
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    def pair(self, shape: Shape) -> Pair:
        """Returns the same change as a pair, differentiable in the tensors.

        Only a `Chain` needs the weight's `shape`.
        """
        return Pair(up=self.scale * self.up if self.scale != 1 else self.up, down=self.down)


class Chain(NamedTuple):
    """Two trained vectors around frozen matrices: diag(outer)·up·diag(inner)·down.

    `outer` (outputs,), `up` (≥ outputs, k), `inner` (k,), `down` (k, ≥ inputs). If a matrix is
    larger than the weight, its leading part is used.
    """

    outer: Tensor
    up: Tensor
    inner: Tensor
    down: Tensor

    def times(self, factor: float) -> Chain:
        """Returns the chain that changes a weight `factor` times as much."""
        return self if factor == 1 else self._replace(outer=factor * self.outer)

    def cut_to(self, shape: Shape) -> Chain:
        """Returns the chain with the part of its matrices that a weight of `shape` needs."""
        return self._replace(up=self.up[: shape.outputs], down=self.down[:, : shape.inputs])

    def applied_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns diag(outer)·up·diag(inner)·down x for x (…, inputs), in `dtype`."""
        outer, up, inner, down = (tensor.to(dtype) for tensor in self)
        return (((x.to(dtype) @ down.T) * inner) @ up.T) * outer

    def pair(self, shape: Shape) -> Pair:
        """Returns the same change as a pair, differentiable in the vectors."""
        outer, up, inner, down = self.cut_to(shape)
        return Pair(up=outer.unsqueeze(1) * up, down=inner.unsqueeze(1) * down)


Change = LowRank | Chain
