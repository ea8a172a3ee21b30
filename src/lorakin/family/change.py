"""The forms that a member's change of a weight can have, as its tensors say it: what kernels compute with.

| form | change | members |
|---|---|---|
| `LowRank` | scale · up · down | all but VeRA |
| `Chain` | diag(outer) · up · diag(inner) · down, up and down frozen | VeRA |

Each is a `Pair` too, with the scale in `up`. A gain comes on top (`Member.gain`), and constant changes
beside it (`Modifier.beside_pair`).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lorakin.family.pair import Pair, Shape


class LowRank(NamedTuple):
    """scale · up · down, with `up` (outputs, k) and `down` (k, inputs) as the optimizer trains them.

    The scale stays outside, so that kernels multiply by the tensors as they are.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    def pair(self, shape: Shape) -> Pair:
        """The same as a pair, differentiable in the tensors."""
        return Pair(up=self.scale * self.up if self.scale != 1 else self.up, down=self.down)


class Chain(NamedTuple):
    """A pair of which only two vectors train, diag(outer)·up and diag(inner)·down, around frozen matrices.

    `outer` (outputs,), `up` (≥ outputs, k), `inner` (k,), `down` (k, ≥ inputs): the leading part of the matrices counts.
    """

    outer: Tensor
    up: Tensor
    inner: Tensor
    down: Tensor

    def times(self, factor: float) -> Chain:
        """The chain that changes a weight `factor` times as much."""
        return self if factor == 1 else self._replace(outer=factor * self.outer)

    def pair(self, shape: Shape) -> Pair:
        """The same as a pair, differentiable in the vectors."""
        up, down = self.up[: shape.outputs], self.down[:, : shape.inputs]
        return Pair(up=self.outer.unsqueeze(1) * up, down=self.inner.unsqueeze(1) * down)


Change = LowRank | Chain
