"""Our Triton operators in plain torch, for the pretended GPU.

Triton's interpreter takes milliseconds for a block of a kernel, too long for whole models. So the
tests of models use these, and `test_triton_kernels.py` compares the kernels themselves with float64.
A real GPU runs the kernels everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakin.kernels import triton_operators
from references.philox import kept


def install() -> torch.library.Library:
    """Replaces the operators' implementations; returns what must be kept alive."""
    library = torch.library.Library("lorakin", "IMPL")
    for function in (
        zeroed,
        dropped_product,
        dropped_down_gradient,
        dropped_input_product,
        summed,
        changed_row_norms,
        gain_gradient,
    ):
        library.impl(function.__name__, function, "CUDA", allow_override=True)
    return library


def _mask(x: Tensor, seed: int, threshold: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    mask = torch.from_numpy(kept(seed, threshold, *rows.shape))
    return mask.to(x.device).view(x.shape)


def zeroed(x: Tensor, seed: int, threshold: int) -> Tensor:
    return x * _mask(x, seed, threshold)


def dropped_product(x: Tensor, down: Tensor, seed: int, threshold: int) -> Tensor:
    _, _, parts = triton_operators.parts_of_product(*x.shape)
    return _as_parts(zeroed(x, seed, threshold).float() @ down.T.float(), parts, x.dtype)


def dropped_down_gradient(
    back: Tensor, x: Tensor, scale: float, seed: int, threshold: int
) -> Tensor:
    wide = scale * (back.T.float() @ zeroed(x, seed, threshold).float())
    return _as_parts(wide, triton_operators.parts_of_down_gradient(len(x)), x.dtype)


def summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts.sum(0).to(dtype)


def _as_parts(whole: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Returns the sum as the first of so many parts."""
    if parts == 1:
        return whole.to(dtype).unsqueeze(0)
    return torch.cat([whole.unsqueeze(0), whole.new_zeros(parts - 1, *whole.shape)])


def dropped_input_product(
    back: Tensor, down: Tensor, scale: float, seed: int, threshold: int
) -> Tensor:
    product = scale * (back.float() @ down.float())
    return (product * _mask(product, seed, threshold)).to(back.dtype)


def changed_row_norms(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    changed = weight.float() + scale * (up.float() @ down.float())
    return torch.linalg.vector_norm(changed, dim=1)


def gain_gradient(
    delta: Tensor, multiplied: Tensor, bias: Tensor | None, gain_minus_one: Tensor, with_less: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide, less = delta.float(), delta.float() * gain_minus_one.float()
    without_bias = multiplied.float() if bias is None else multiplied.float() - bias.float()
    rows_of_a_part, _ = triton_operators.parts_of(*delta.shape)
    parts = [part.sum(0) for part in (wide * without_bias).split(rows_of_a_part)]
    gained = (wide + less).to(delta.dtype)
    return torch.stack(parts), gained, less.to(delta.dtype) if with_less else delta.new_empty(0)
