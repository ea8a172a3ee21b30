"""The common form of every change: a low-rank pair beside a weight, perhaps a gain over both.

    W  =  diag(gain) · (W0 + up · down)          up: (out, k)   down: (k, in)   gain: (out,) or absent

Merging, files, counts, norms and pictures are written once, against `Pair`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""A module's tensors by slot. Modules that share a tensor hold the same object."""


class Shape(NamedTuple):
    """The matrix that a module's weight is, whatever the module's own layout.

    `outputs` × `inputs`; a convolution's `inputs` are its input channels times its kernel. A `lookup` (an embedding)
    picks columns of the matrix instead of multiplying by it: its `inputs` are the vocabulary.
    """

    outputs: int
    inputs: int
    lookup: bool = False


class Pair(NamedTuple):
    """The change of one weight: `up` (outputs, k), `down` (k, inputs), `gain` (outputs,) or None.

    Scales such as alpha/rank live inside `up`.
    """

    up: Tensor
    down: Tensor
    gain: Tensor | None = None

    def applied_to(self, weight: Tensor) -> Tensor:
        """The changed weight diag(gain)·(W0 + up·down), (outputs, inputs), in the dtype of `weight`."""
        changed = weight + (self.up.to(weight.dtype) @ self.down.to(weight.dtype))
        return changed if self.gain is None else self.gain.to(weight.dtype).unsqueeze(1) * changed

    def norm(self) -> float:
        """The Frobenius norm of up·down, without forming it."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


def widened(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors in float32, those in float64 as they are: what pairs are computed in."""
    return {slot: t.to(torch.promote_types(t.dtype, torch.float32)) for slot, t in tensors.items()}
