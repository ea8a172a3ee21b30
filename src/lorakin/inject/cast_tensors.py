"""An adapter's tensors in the dtype of the base's products, cast together once a forward.

The parameters stay in float32. `ModelHooks` begins and ends a forward of the model; the first layer
that asks has the tensors of all layers cast, by one kernel for some hundred tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorakin.family import widened
from lorakin.family.pair import Tensors
from lorakin.kernels.autograd import PLAIN_TYPES
from lorakin.kernels.cast_together import cast_together

if TYPE_CHECKING:
    from lorakin.inject.branch import Branch

Key = tuple[torch.device, torch.dtype, bool]
"""Where the tensors are, the dtype that they are cast to, and whether gradients are wanted."""


class CastTensors:
    """The cast tensors of one adapter's branches, while a forward of its model runs.

    A layer takes its tensors once. A layer that is called again, or outside a forward of the model
    (in a checkpoint that runs again, say), has its own cast, so that gradients are always added in
    the parameters' dtype.
    """

    def __init__(self) -> None:
        self.branches: list[Branch] = []
        self._cast: dict[Key, dict[str, tuple[Tensors, Tensors]]] | None = None

    def begin(self) -> None:
        """Begins a forward of the model."""
        self._cast = {}

    def end(self) -> None:
        """Ends it: what was cast and not taken is dropped."""
        self._cast = None

    def take(self, branch: Branch, dtype: torch.dtype) -> Tensors:
        """Returns the branch's tensors by slot, those of its pair cast to `dtype`."""
        tensors = branch.tensors_to_cast(dtype)
        if not tensors:
            return branch.float32_tensors()
        cast = self._taken(branch, tensors, dtype)
        if cast is None:
            copies = cast_together(list(tensors.values()), dtype)
            cast = dict(zip(tensors, copies, strict=True))
        rest = {slot: t for slot, t in branch.tensors().items() if slot not in cast}
        return {**widened(rest), **cast}

    def _taken(self, branch: Branch, tensors: Tensors, dtype: torch.dtype) -> Tensors | None:
        """Takes what was cast for the branch in this forward; None if there is nothing for it."""
        if self._cast is None or not all(_is_in_place(t) for t in tensors.values()):
            return None
        device = next(iter(tensors.values())).device
        key = (device, dtype, torch.is_grad_enabled())
        if key not in self._cast:
            self._cast[key] = _cast_all(self.branches, device, dtype)
        given, cast = self._cast[key].pop(branch.path, ({}, None))
        are_same = given.keys() == tensors.keys() and all(given[s] is t for s, t in tensors.items())
        return cast if are_same else None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cast": None}


def _is_in_place(tensor: Tensor) -> bool:
    """Returns whether a tensor has its values now, and not only when its layer is called."""
    return type(tensor) in PLAIN_TYPES and not tensor.is_meta and tensor.numel() > 0


def _cast_all(
    branches: Iterable[Branch], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Tensors, Tensors]]:
    """Returns the tensors of all branches on `device`, as they are and cast, by path and slot."""
    by_path = {branch.path: branch.tensors_to_cast(dtype) for branch in branches}
    by_path = {
        path: tensors
        for path, tensors in by_path.items()
        if tensors and all(_is_in_place(t) and t.device == device for t in tensors.values())
    }
    flat: Sequence[Tensor] = [t for tensors in by_path.values() for t in tensors.values()]
    copies = iter(cast_together(flat, dtype))
    return {
        path: (tensors, {slot: next(copies) for slot in tensors})
        for path, tensors in by_path.items()
    }
