"""Tensors that the backward recomputes instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Recomputation(NamedTuple):
    """How to compute a tensor again from others that autograd keeps anyway.

    `make(*parts)` returns the tensor. `version` is the tensor's when the recipe was written.

    >>> import torch
    >>> x = torch.ones(2)
    >>> recipe = Recomputation.of(Recomputation.attach(2 * x, lambda x: 2 * x, (x,)))
    >>> recipe.make(*recipe.parts)
    tensor([2., 2.])
    """

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    version: int = 0

    @classmethod
    def attach(
        cls, tensor: Tensor, make: Callable[..., Tensor], parts: tuple[Tensor, ...]
    ) -> Tensor:
        """Attaches a recipe to `tensor`, and returns it."""
        recipe = cls(make, tuple(part.detach() for part in parts), tensor._version)
        tensor._lorakin_recipe = recipe  # type: ignore[attr-defined]
        return tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Recomputation:
        """Returns the recipe of `tensor`; one that keeps it if there is none, or it has changed."""
        recipe = getattr(tensor, "_lorakin_recipe", None)
        if isinstance(recipe, cls) and recipe.version == tensor._version:
            return recipe
        return cls(_unchanged, (tensor,))


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
