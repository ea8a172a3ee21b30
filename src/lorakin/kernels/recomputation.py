"""Tensors that the backward recomputes instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

    def parts_to_keep(self) -> tuple[Tensor, ...]:
        """Returns `parts`, for a function whose backward will call `make` once."""
        if isinstance(self.make, Once):
            self.make.calls += 1
        return self.parts

    @classmethod
    def of(cls, tensor: Tensor) -> Recomputation:
        """Returns the recipe of `tensor`; one that keeps it if there is none, or it has changed."""
        recipe = getattr(tensor, "_lorakin_recipe", None)
        if isinstance(recipe, cls) and recipe.version == tensor._version:
            return recipe
        return cls(_unchanged, (tensor,))


class Once:
    """A `make` that computes once for all the functions that read the tensor.

    The first backward computes it and the last drops it: those of a block's layers run one after
    another. A GPU saves kernels; there is one such tensor at a time.

    >>> import torch
    >>> recipe = Recomputation(Once(torch.clone), (torch.ones(2),))
    >>> parts = recipe.parts_to_keep(), recipe.parts_to_keep()
    >>> recipe.make(*parts[0]) is recipe.make(*parts[1])
    True
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make = make
        self.calls = 0
        self.made: Tensor | None = None

    def __call__(self, *parts: Any) -> Tensor:
        made = self.make(*parts) if self.made is None else self.made
        self.calls -= 1
        self.made = made if self.calls > 0 else None
        return made


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
