"""Base class of tensors that stand for a changed weight without forming it.

Most code that reads a weight asks for its shape or dtype, multiplies by it, or looks up rows in it.
A subclass of `UnformedWeight` answers these from its parts. Anything else forms the changed weight,
so a module with its own way to compute with its weight still gets the right values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.utils._pytree import tree_map_only

from lorakin.errors import StateError

METADATA = frozenset(
    "shape dtype device layout ndim requires_grad is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_nested is_leaf grad grad_fn dim size stride numel nelement element_size is_floating_point "
    "is_complex __len__ __hash__ __repr__".split()
)
"""Attributes and methods that need no values."""
ADDRESSES = frozenset({"data_ptr", "untyped_storage", "storage", "__dlpack__"})


class UnformedWeight(Tensor):
    """A changed weight that is formed only where something needs its values.

    Subclasses define `formed`, `compute_from_parts` and `address_refused`, the message for kernels
    that take weights by address and so would miss the change.
    """

    address_refused: ClassVar[str]

    @classmethod
    def shaped_like(cls, weight: Tensor) -> Self:
        """Returns a tensor without storage, of the shape, strides, dtype and device of `weight`."""
        tensor: Self = Tensor._make_wrapper_subclass(
            cls,
            weight.shape,
            weight.stride(),
            dtype=weight.dtype,
            device=weight.device,
            layout=weight.layout,
        )
        return tensor

    def formed(self) -> Tensor:
        """Computes the changed weight as a plain tensor."""
        raise NotImplementedError

    @classmethod
    def compute_from_parts(
        cls, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Computes `func`, which has this `name`, from the parts; None if it needs the whole."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of_function(func)
        if name in METADATA:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in ADDRESSES:
            raise StateError(cls.address_refused)
        if (result := cls.compute_from_parts(name, func, args, kwargs)) is not None:
            return result
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        formed_args, formed_kwargs = tree_map_only(
            UnformedWeight, lambda weight: weight.formed(), (args, kwargs or {})
        )
        return func(*formed_args, **formed_kwargs)


def name_of_function(func: Any) -> str:
    """Returns the name of a function of torch, an operator without its overload, or an attribute.

    >>> import torch
    >>> name_of_function(torch.matmul), name_of_function(Tensor.shape.__get__)
    ('matmul', 'shape')
    """
    name = getattr(func, "__name__", str(func))
    return str(func.__self__.__name__) if name == "__get__" else name.split(".")[0]
