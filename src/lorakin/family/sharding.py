"""Tensors and runs that are spread over several processes, by torch or by DeepSpeed."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakin.errors import StateError
from lorakin.family.weight import FrozenWeight


class ShardedWeight(FrozenWeight):
    """A weight of which this process holds only a part, or nothing."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self.shape, self.dtype, self.device = shape, like.dtype, like.device

    @property
    def matrix(self) -> Tensor:
        raise StateError(
            "the base is sharded over several processes, so this one lacks parts of a weight that "
            "the adapter's files need; load the last checkpoint in a single process and save it "
            "there"
        )


def is_distributed(tensor: object) -> bool:
    """Returns whether it is one of torch's DTensors."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def is_sharded(tensor: object) -> bool:
    """Returns whether this process holds only part of it: a DTensor, or a tensor of ZeRO-3."""
    if hasattr(tensor, "ds_id") and isinstance(tensor, Tensor):
        return tensor.ds_status.name != "AVAILABLE"  # type: ignore[attr-defined, no-any-return]
    return isinstance(tensor, ShardedWeight) or is_distributed(tensor)


def whole_shape(tensor: Tensor) -> torch.Size:
    """Returns the shape of the whole tensor, also if DeepSpeed has sharded it."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def several_processes() -> bool:
    """Returns whether several processes train together and this is one of them."""
    distributed = torch.distributed
    is_one = distributed.is_available() and distributed.is_initialized()
    return is_one and distributed.get_world_size() > 1
