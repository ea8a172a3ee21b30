"""Our Triton kernels as operators of torch: `torch.ops.lorakin.…`, for CUDA devices.

As operators they work on torch's fake tensors, and a profiler or counter sees each as one kernel.
This file imports torch alone; Triton is imported when an operator first runs. `are_usable` says
whether they can run here; where they cannot, callers use plain operations.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lorakin.errors import LorakinWarning

LARGEST_RANK = 128
"""The largest rank whose products the kernels compute: a block of sums must fit into registers."""
DTYPES = (torch.bfloat16, torch.float16)
"""Exact products of float32 do not run on tensor cores: there torch's own are faster."""
PROGRAMS = 264
"""How many programs a launch should have at least: two for each multiprocessor of an H100."""

LIBRARY = torch.library.Library("lorakin", "FRAGMENT")
LIBRARY.define("zeroed(Tensor x, int seed, int threshold) -> Tensor")
LIBRARY.define("dropped_product(Tensor x, Tensor down, int seed, int threshold) -> Tensor")
LIBRARY.define(
    "dropped_down_gradient(Tensor back, Tensor x, float scale, int seed, int threshold) -> Tensor"
)
LIBRARY.define(
    "dropped_input_product(Tensor back, Tensor down, float scale, int seed, int threshold) "
    "-> Tensor"
)
LIBRARY.define("summed(Tensor parts, ScalarType dtype) -> Tensor")
LIBRARY.define("changed_row_norms(Tensor weight, Tensor up, Tensor down, float scale) -> Tensor")
LIBRARY.define(
    "gain_gradient(Tensor delta, Tensor multiplied, Tensor? bias, Tensor gain_minus_one, "
    "bool with_less) -> (Tensor, Tensor, Tensor)"
)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What launches the kernel of each operator, by name."""


def _on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a function `_name` as the implementation of the operator `name` on CUDA."""
    name = function.__name__.removeprefix("_")
    IMPLEMENTATIONS[name] = function
    LIBRARY.impl(name, function, "CUDA")
    return function


@functools.cache
def are_usable(device: torch.device) -> bool:
    """Returns whether the operators run on `device`: an NVIDIA GPU since Ampere, with Triton.

    >>> are_usable(torch.device("cpu"))
    False

    Warns:
        LorakinWarning: Triton is there but cannot compile, mostly for want of a C compiler.
    """
    if device.type != "cuda" or torch.version.hip or not importlib.util.find_spec("triton"):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with _disable_current_modes():  # a fake tensor would compile nothing
            one = torch.ones(1, 1, device=device, dtype=torch.bfloat16)
            torch.ops.lorakin.changed_row_norms(one, one, one, 1.0)
    except Exception as error:  # a compiler, a driver or Triton itself may fail in any way
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Triton cannot compile kernels for {device} here ({type(error).__name__}: {reason}); "
            "plain operations are used, which are slower. Triton needs a C compiler, such as gcc",
            LorakinWarning,
            stacklevel=2,
        )
        return False
    return True


def fit(*tensors: Tensor, rank: int = 1) -> bool:
    """Returns whether the operators compute with these tensors and this rank.

    >>> fit(torch.ones(2, 2))
    False
    """
    first = tensors[0]
    same = all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    return same and first.dtype in DTYPES and 0 < rank <= LARGEST_RANK and are_usable(first.device)


def _power_of_two(n: int, least: int, most: int) -> int:
    """Returns the smallest power of two that is at least n, within limits."""
    return min(most, max(least, 1 << max(0, n - 1).bit_length()))


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


ROWS_OF_A_PART = 1024
"""How many rows a program sums at most for the gradient of `down`: 16 blocks, one after another."""


def parts_of_product(rows: int, inputs: int) -> tuple[int, int, int]:
    """Returns how x̃ downᵀ is cut: the rows of a block, the inputs of a part, the number of parts.

    With few rows there are few blocks, so the inputs are cut too.

    >>> parts_of_product(8192, 4096), parts_of_product(512, 14336)
    ((16, 4096, 1), (16, 1600, 9))
    """
    block = _power_of_two(_blocks(rows, 2 * PROGRAMS), 16, 64)
    blocks = max(1, _blocks(rows, block))
    parts = 1 if blocks >= PROGRAMS // 3 else min(_blocks(PROGRAMS, blocks), _blocks(inputs, 256))
    inputs_of_a_part = 64 * max(1, _blocks(_blocks(inputs, parts), 64))
    return block, inputs_of_a_part, max(1, _blocks(inputs, inputs_of_a_part))


def parts_of_down_gradient(rows: int) -> int:
    """Returns into how many parts the rows are cut for the gradient of `down`.

    >>> parts_of_down_gradient(8192)
    8
    """
    return max(1, _blocks(rows, ROWS_OF_A_PART))


def sum_of_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum, in `dtype`, of what an operator computed in parts, the first dimension."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    summed: Tensor = torch.ops.lorakin.summed(parts, dtype)
    return summed


def parts_of(rows: int, outputs: int) -> tuple[int, int]:
    """Returns how a sum over rows is cut: the rows of a part, and the number of parts.

    >>> parts_of(8192, 4096), parts_of(8, 4096)
    ((1664, 5), (32, 1))
    """
    parts = max(1, min(_blocks(rows, 32), _blocks(PROGRAMS, _blocks(outputs, 64))))
    rows_of_a_part = 32 * max(1, _blocks(_blocks(rows, parts), 32))
    return rows_of_a_part, max(1, _blocks(rows, rows_of_a_part))


def _on(tensor: Tensor) -> Any:
    """Returns a context in which Triton launches on the tensor's device."""
    return torch.cuda.device(tensor.device)


@_on_cuda
def _zeroed(x: Tensor, seed: int, threshold: int) -> Tensor:
    from lorakin.kernels import triton_dropout as kernels

    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    rows = x.numel() // max(1, columns)
    if x.numel():
        grid = _blocks(rows, 4), _blocks(columns, 256)
        with _on(x):
            kernels.zeroed_kernel[grid](
                x, out, seed, threshold, rows, columns, ROWS=4, COLUMNS=256, num_warps=4
            )
    return out


@_on_cuda
def _dropped_product(x: Tensor, down: Tensor, seed: int, threshold: int) -> Tensor:
    from lorakin.kernels import triton_dropout as kernels

    x, down = x.contiguous(), down.contiguous()
    (rows, inputs), rank = x.shape, len(down)
    block, inputs_of_a_part, parts = parts_of_product(rows, inputs)
    out = x.new_empty(parts, rows, rank, dtype=torch.float32 if parts > 1 else x.dtype)
    if rows:
        with _on(x):
            kernels.product_kernel[(_blocks(rows, block), parts)](
                x, down, out, seed, threshold, rows, inputs, rank, inputs_of_a_part,
                ROWS=block, INPUTS=64, RANK=_power_of_two(rank, 16, LARGEST_RANK), num_warps=8,
            )  # fmt: skip
    return out


@_on_cuda
def _dropped_down_gradient(
    back: Tensor, x: Tensor, scale: float, seed: int, threshold: int
) -> Tensor:
    from lorakin.kernels import triton_dropout as kernels

    back, x = back.contiguous(), x.contiguous()
    (rows, inputs), rank = x.shape, back.shape[1]
    parts = parts_of_down_gradient(rows)
    out = x.new_empty(parts, rank, inputs, dtype=torch.float32 if parts > 1 else x.dtype)
    block = _power_of_two(_blocks(inputs, PROGRAMS // 2), 16, 64)
    with _on(x):
        kernels.down_gradient_kernel[(_blocks(inputs, block), parts)](
            back, x, out, scale, seed, threshold, rows, inputs, rank, ROWS_OF_A_PART,
            ROWS=64, INPUTS=block, RANK=_power_of_two(rank, 16, LARGEST_RANK), num_warps=8,
        )  # fmt: skip
    return out


@_on_cuda
def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    from lorakin.kernels import triton_dropout as kernels

    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    if out.numel():
        with _on(parts):
            kernels.sum_kernel[(_blocks(out.numel(), 1024),)](
                parts, out, len(parts), out.numel(), BLOCK=1024, num_warps=4
            )
    return out


@_on_cuda
def _dropped_input_product(
    back: Tensor, down: Tensor, scale: float, seed: int, threshold: int
) -> Tensor:
    from lorakin.kernels import triton_dropout as kernels

    back, down = back.contiguous(), down.contiguous()
    rows, (rank, inputs) = len(back), down.shape
    out = back.new_empty(rows, inputs)
    if rows:
        grid = _blocks(rows, 32), _blocks(inputs, 64)
        with _on(back):
            kernels.input_product_kernel[grid](
                back, down, out, scale, seed, threshold, rows, inputs, rank,
                ROWS=32, INPUTS=64, RANK=_power_of_two(rank, 16, LARGEST_RANK), num_warps=8,
            )  # fmt: skip
    return out


@_on_cuda
def _changed_row_norms(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    from lorakin.kernels import triton_gain as kernels

    weight, up, down = weight.contiguous(), up.contiguous(), down.contiguous()
    (outputs, inputs), rank = weight.shape, len(down)
    norms = weight.new_empty(outputs, dtype=torch.float32)
    block = _power_of_two(_blocks(outputs, PROGRAMS // 2), 16, 32)
    with _on(weight):
        kernels.row_norms_kernel[(_blocks(outputs, block),)](
            weight, up, down, norms, scale, outputs, inputs, rank,
            OUTPUTS=block, INPUTS=64, RANK=_power_of_two(rank, 16, LARGEST_RANK), num_warps=8,
        )  # fmt: skip
    return norms


@_on_cuda
def _gain_gradient(
    delta: Tensor, multiplied: Tensor, bias: Tensor | None, gain_minus_one: Tensor, with_less: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from lorakin.kernels import triton_gain as kernels

    delta, multiplied = delta.contiguous(), multiplied.contiguous()
    rows, outputs = delta.shape
    gained = torch.empty_like(delta)
    less = torch.empty_like(delta) if with_less else delta.new_empty(0)
    rows_of_a_part, parts = parts_of(rows, outputs)
    partial = delta.new_empty(parts, outputs, dtype=torch.float32)
    with _on(delta):
        kernels.gain_gradient_kernel[(_blocks(outputs, 64), parts)](
            delta, multiplied, bias, gain_minus_one, gained, less, partial,
            rows, outputs, rows_of_a_part,
            HAS_BIAS=bias is not None, WRITES_LESS=with_less, ROWS=32, OUTPUTS=64, num_warps=8,
        )  # fmt: skip
    return partial, gained, less


@torch.library.register_fake("lorakin::zeroed", lib=LIBRARY)
def _fake_zeroed(x: Tensor, seed: int, threshold: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("lorakin::dropped_product", lib=LIBRARY)
def _fake_dropped_product(x: Tensor, down: Tensor, seed: int, threshold: int) -> Tensor:
    _, _, parts = parts_of_product(*x.shape)
    dtype = torch.float32 if parts > 1 else x.dtype
    return x.new_empty(parts, len(x), len(down), dtype=dtype)


@torch.library.register_fake("lorakin::dropped_down_gradient", lib=LIBRARY)
def _fake_dropped_down_gradient(
    back: Tensor, x: Tensor, scale: float, seed: int, threshold: int
) -> Tensor:
    parts = parts_of_down_gradient(len(x))
    dtype = torch.float32 if parts > 1 else x.dtype
    return x.new_empty(parts, back.shape[1], x.shape[1], dtype=dtype)


@torch.library.register_fake("lorakin::summed", lib=LIBRARY)
def _fake_summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts.new_empty(parts.shape[1:], dtype=dtype)


@torch.library.register_fake("lorakin::dropped_input_product", lib=LIBRARY)
def _fake_dropped_input_product(
    back: Tensor, down: Tensor, scale: float, seed: int, threshold: int
) -> Tensor:
    return back.new_empty(len(back), down.shape[1])


@torch.library.register_fake("lorakin::changed_row_norms", lib=LIBRARY)
def _fake_changed_row_norms(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    return weight.new_empty(len(weight), dtype=torch.float32)


@torch.library.register_fake("lorakin::gain_gradient", lib=LIBRARY)
def _fake_gain_gradient(
    delta: Tensor, multiplied: Tensor, bias: Tensor | None, gain_minus_one: Tensor, with_less: bool
) -> tuple[Tensor, Tensor, Tensor]:
    less = torch.empty_like(delta) if with_less else delta.new_empty(0)
    _, parts = parts_of(*delta.shape)
    partial = delta.new_empty(parts, delta.shape[1], dtype=torch.float32)
    return partial, torch.empty_like(delta), less
