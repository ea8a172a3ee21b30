"""The common form of every change: a low-rank pair beside a weight, perhaps with a gain over both.

    W  =  diag(gain) · (W0 + up · down)       up: (out, k)   down: (k, in)   gain: (out,) or absent

Merging, files, counts, norms and pictures are written once, for `Pair`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorakin.errors import StateError

Tensors = dict[str, Tensor]
"""A module's tensors by slot. Modules that share a tensor hold the same object."""


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
        """diag(gain)·(W0 + up·down), (outputs, inputs), in the dtype of `weight`."""
        changed = torch.addmm(weight, self.up.to(weight.dtype), self.down.to(weight.dtype))
        return changed if self.gain is None else self.gain.to(weight.dtype).unsqueeze(1) * changed

    def times(self, factor: float) -> Pair:
        """The pair that changes a weight `factor` times as much: W0 + factor·(W − W0).

        With a gain g that is g' = 1 + factor·(g − 1) over W0 + (factor·g/g')·up·down. If g' is 0,
        the smallest step of float32 takes its place, which leaves less of a weight than rounding.

        >>> pair = Pair(torch.ones(2, 1), torch.ones(1, 2), gain=torch.tensor([2.0, 4.0]))
        >>> pair.times(0.5).gain
        tensor([1.5000, 2.5000])
        """
        if factor == 1:
            return self
        if self.gain is None:
            return self._replace(up=factor * self.up)
        gain = 1 + factor * (self.gain - 1)
        gain = torch.where(gain.abs() < LEAST, LEAST, gain)
        return Pair((factor * self.gain / gain).unsqueeze(1) * self.up, self.down, gain)

    def norm(self) -> float:
        """The Frobenius norm of up·down, without forming the product."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


LEAST = torch.finfo(torch.float32).eps
"""The smallest gain that `Pair.times` gives."""


class FrozenWeight:
    """A frozen weight as a matrix (outputs, inputs), with what training asks of it in each forward.

    A quantised weight has no matrix at hand (`inject/quantised.py`), so ask for as few of its
    numbers as will do.
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
        wide = torch.promote_types(self.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(rows.to(wide), dim=1) for rows in self.blocks()]
        return torch.cat(norms).square()

    def blocks(self) -> Iterable[Tensor]:
        """Its rows in order, `BLOCK` numbers at a time."""
        return blocks(self.matrix)

    def product(self, down: Tensor) -> Tensor:
        """W0·downᵀ (outputs, k), in the dtype in which the forward multiplies."""
        return self.matrix @ down.to(self.dtype).T

    def rows(self, which: Tensor) -> Tensor:
        """The rows that a mask (outputs,) selects."""
        return self.matrix[which]


BLOCK = 1 << 20
"""How many numbers of a weight are processed at a time."""


def blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """The rows of `matrix`, `BLOCK` numbers at a time."""
    return torch.split(matrix, max(1, BLOCK // max(1, matrix.shape[1])))


class ShardedWeight(FrozenWeight):
    """A weight of which this process holds only a part, or nothing."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device

    @property
    def matrix(self) -> Tensor:
        raise StateError(
            "the base is sharded over several processes, so this one lacks numbers of a weight "
            "that the adapter's files need; load the last checkpoint in a single process and save "
            "it there"
        )


def is_distributed(tensor: object) -> bool:
    """Whether it is one of torch's DTensors."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def is_sharded(tensor: object) -> bool:
    """Whether this process holds only part of it: a DTensor, or a tensor that DeepSpeed cut."""
    if hasattr(tensor, "ds_id") and isinstance(tensor, Tensor):
        return tensor.ds_status.name != "AVAILABLE"  # type: ignore[attr-defined, no-any-return]
    return isinstance(tensor, ShardedWeight) or is_distributed(tensor)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor, also if DeepSpeed has cut it."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def has_no_values(weight: Tensor | FrozenWeight) -> bool:
    """Whether it has a shape but no numbers: on the meta device, or a fake tensor of torch's."""
    tensor = weight if isinstance(weight, Tensor) else getattr(weight, "_matrix", None)
    return weight.device.type == "meta" or isinstance(tensor, FakeTensor)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    Only its extremes are tested, which is much faster than testing every number.
    """
    return not tensor.numel() or all(
        bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)
    )


def widened(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors in float32, those in float64 as they are: pairs are computed in these."""
    wide = (torch.float32, torch.float64)
    return {
        slot: t if t.dtype in wide else t.to(torch.promote_types(t.dtype, wide[0]))
        for slot, t in tensors.items()
    }


def cast_keeping_shared(
    tensors: Mapping[str, Tensors], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensors]:
    """All modules' tensors in these dtypes; those that were one object still are."""
    cast: dict[tuple[int, torch.dtype], Tensor] = {}
    return {
        path: {
            slot: cast.setdefault((id(t), dtypes[path]), t.to(dtypes[path]))
            for slot, t in there.items()
        }
        for path, there in tensors.items()
    }
