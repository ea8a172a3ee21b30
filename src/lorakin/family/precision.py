"""The dtypes in which adapters are computed: float32, or float64 on a float64 base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorakin.family.pair import Tensors


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float32, or `dtype` if that is wider.

    >>> wide_dtype(torch.bfloat16), wide_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def widened(tensors: Mapping[str, Tensor]) -> Tensors:
    """Returns the tensors in float32, those in float64 as they are: pairs are computed in these.

    >>> widened({"A": torch.ones(1, dtype=torch.bfloat16)})["A"].dtype
    torch.float32
    """
    wide = (torch.float32, torch.float64)
    return {
        slot: t if t.dtype in wide else t.to(wide_dtype(t.dtype)) for slot, t in tensors.items()
    }


def copied_keeping_shared(initial: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Returns contiguous copies of all modules' tensors; those that were one object still are."""
    copies: dict[int, Tensor] = {}
    for tensors in initial.values():
        for tensor in tensors.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return {
        path: {slot: copies[id(tensor)] for slot, tensor in tensors.items()}
        for path, tensors in initial.items()
    }


def cast_keeping_shared(
    tensors: Mapping[str, Tensors], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensors]:
    """Returns all modules' tensors in these dtypes; those that were one object still are."""
    cast: dict[tuple[int, torch.dtype], Tensor] = {}
    return {
        path: {
            slot: cast.setdefault((id(t), dtypes[path]), t.to(dtypes[path]))
            for slot, t in of_module.items()
        }
        for path, of_module in tensors.items()
    }


def all_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor holds neither NaN nor infinity.

    Only its extremes are tested, which is much faster than testing every element.

    >>> all_finite(torch.ones(2)), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    return not tensor.numel() or all(
        bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)
    )
