"""A gain near 1 over a layer's output, and what its backward needs of the output's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakin.family import FrozenWeight
from lorakin.kernels import triton_operators
from lorakin.kernels.thin_products import sum_of_rows


def minus_one(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns g − 1 in `dtype`, computed in the dtype of `gain`; it has no gradient.

    >>> minus_one(torch.tensor([1.001]), torch.bfloat16)
    tensor([0.0010], dtype=torch.bfloat16)
    """
    return torch.sub(gain.detach(), 1, out=torch.empty_like(gain, dtype=dtype))


def gain_gradient(
    delta: Tensor,
    multiplied: Tensor,
    bias: Tensor | None,
    gain_minus_one: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns Σ δ ⊙ (multiplied − b) over the rows, (outputs,) in `dtype`, and g ⊙ δ.

    Args:
        delta: δ, (rows, outputs).
        multiplied: (rows, outputs).
        bias: (outputs,) or None.
        gain_minus_one: g − 1, (outputs,), in the dtype of `delta`.
        dtype: that of the gain.

    >>> ones = torch.ones(3, 2)
    >>> gain_gradient(ones, ones, None, torch.tensor([0.0, 1.0]), torch.float32)[0]
    tensor([3., 3.])
    """
    if triton_operators.fit(delta, multiplied, gain_minus_one):
        parts, gained, _ = torch.ops.lorakin.gain_gradient(
            delta, multiplied, bias, gain_minus_one, False
        )
        return triton_operators.sum_of_parts(parts, dtype), gained
    without_bias = multiplied if bias is None else multiplied - bias
    sums = sum_of_rows(delta * without_bias, dtype)
    return sums, torch.addcmul(delta, delta, gain_minus_one)


def dropped_gain_gradient(
    delta: Tensor, multiplied: Tensor, gain_minus_one: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns Σ δ ⊙ multiplied as `gain_gradient` does, g ⊙ δ, and (g − 1) ⊙ δ.

    >>> ones = torch.ones(3, 2)
    >>> dropped_gain_gradient(ones, ones, torch.tensor([0.0, 1.0]), torch.float32)[2][0]
    tensor([0., 1.])
    """
    if triton_operators.fit(delta, multiplied, gain_minus_one):
        parts, gained, less = torch.ops.lorakin.gain_gradient(
            delta, multiplied, None, gain_minus_one, True
        )
        return triton_operators.sum_of_parts(parts, dtype), gained, less
    less = delta * gain_minus_one
    return sum_of_rows(delta * multiplied, dtype), delta + less, less


def _row_norms(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor | None:
    """Returns the norms of the changed rows by one kernel; None if it does not apply."""
    if torch.compiler.is_compiling() or not triton_operators.fit(weight, up, down, rank=len(down)):
        return None
    norms: Tensor = torch.ops.lorakin.changed_row_norms(weight, up, down, scale)
    return norms


FrozenWeight.row_norm_kernels.append(_row_norms)
