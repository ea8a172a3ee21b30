"""What a kind of layer is: a module whose weight can be seen as one matrix (outputs × inputs)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.family import FrozenWeight, Method, Pair, Shape
from lorakin.family.sharding import ShardedWeight, is_sharded, whole_shape
from lorakin.inject.attachments import attachments_or_none
from lorakin.kernels.weight_source import Weight


class LayerKind:
    """How one kind of module holds and applies its weight. A kind has no state of its own."""

    modules: ClassVar[tuple[type[nn.Module], ...]]
    """The classes that are of this kind."""

    @staticmethod
    def shape(module: Any) -> Shape:
        """Returns the shape of the module's weight as a matrix."""
        raise NotImplementedError

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """Returns a weight in the module's layout as a matrix (outputs, inputs)."""
        raise NotImplementedError

    @staticmethod
    def layout(matrix: Tensor, module: Any) -> Tensor:
        """Returns a matrix (outputs, inputs) in the layout of the module's weight."""
        raise NotImplementedError

    @classmethod
    def weight(cls, module: Any) -> Tensor | FrozenWeight:
        """Returns the base's weight as a matrix, even while adapters are merged."""
        parameter = vars(module)["_parameters"].get("weight")
        if parameter is not None and hasattr(parameter, "ds_id") and is_sharded(parameter):
            whole = torch.empty(whole_shape(parameter), device="meta")
            return ShardedWeight(cls.matrix(whole).shape, parameter)
        weight = module.weight
        if (attached := attachments_or_none(module)) is not None:
            weight = attached.base_before_merge.get("weight", weight)
        return cls.matrix(weight.detach())

    @staticmethod
    def weight_for_kernel(
        module: Any, library_forward: Any, x: Any, method: Method
    ) -> Weight | None:
        """Returns the weight by which `kernels.adapted_linear` multiplies x.

        Args:
            module: an adapted module.
            library_forward: the forward of its class before it was adapted.
            x: the module's input.
            method: the adapter's.

        Returns:
            None if no kernel computes this layer for this input.
        """
        return None

    @staticmethod
    def dtype(module: Any, x: Tensor) -> torch.dtype:
        """Returns the dtype in which the module multiplies; an adapter on it does the same."""
        dtype: torch.dtype = module.weight.dtype
        return dtype

    @staticmethod
    def device(module: Any) -> torch.device:
        """Returns the device of the module's weight."""
        device: torch.device = module.weight.device
        return device

    @staticmethod
    def low_rank_product(module: Any, x: Tensor, pair: Pair) -> Tensor:
        """Returns up(down(x)), computed as (x·downᵀ)·upᵀ in the dtype of the pair."""
        raise NotImplementedError

    @staticmethod
    def base_product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Returns W0·x without the bias, for a weight in the module's layout."""
        raise NotImplementedError

    @staticmethod
    def per_output(vector: Tensor, module: Any) -> Tensor:
        """Returns `vector` (outputs,), shaped to multiply the module's output."""
        return vector

    @staticmethod
    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        """Drops out entries of the branch's input."""
        return F.dropout(x, p, training) if p > 0 and training else x

    @staticmethod
    def refusal(module: Any) -> str | None:
        """Returns why a module of this kind cannot be adapted; None if it can."""
        return None
