"""Liger's kernels as operators of torch, `torch.ops.lorakin.…`, for CUDA devices.

Liger's autograd functions write over what they saved, or over the gradient that they were given.
Others may still read those: adapters that keep an output, hooks, a second backward. Its
cross-entropy waits for the GPU. So these operators call the functions and kernels inside, write
into new memory and never wait. Two kernels are ours because Liger's work in place alone: the
gradients of a gate (`triton_gate.py`) and the rotary embedding (`triton_rotary.py`).

As operators they work on torch's fake tensors, and a profiler or counter sees them by name. This
file imports torch alone; Liger, which takes seconds, is imported when an operator is first wanted.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lorakin.errors import LorakinWarning

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 65536
"""The longest row that Liger's kernels hold in one program."""
WIDEST_OF_LOSS = 32768
"""How many logits its cross-entropy looks at at a time."""
ARGUMENTS_OF_LOSS = {
    "X_ptr", "X_stride", "Y_ptr", "Y_stride", "weight_ptr", "loss_ptr", "z_loss_ptr",
    "loss_stride", "token_accuracy_ptr", "token_accuracy_stride", "predicted_tokens_ptr",
    "predicted_tokens_stride", "n_cols", "n_non_ignore", "sum_non_ignore_weight", "weight_sum",
    "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap",
    "RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "BLOCK_SIZE",
    "HAS_WEIGHT", "HAS_SOFTCAPPING", "HAS_GRADIENTS",
}  # fmt: skip
"""What the kernel of its cross-entropy takes; it is not one of Liger's public functions."""

LIBRARY: Any = torch.library.Library("lorakin", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)")
LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor")
LIBRARY.define(
    "rms_norm_backward_of_both(Tensor grad, Tensor x, Tensor weight, Tensor scale) "
    "-> (Tensor, Tensor)"
)
LIBRARY.define("gated(Tensor gate, Tensor up) -> Tensor")
LIBRARY.define("gated_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
LIBRARY.define("rotated(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor")
LIBRARY.define(
    "softmax_less_target(Tensor(a!) logits, Tensor target, Tensor(b!) losses, int ignored) -> ()"
)


def fit(*tensors: Tensor) -> bool:
    """Returns whether the operators compute with these tensors: CUDA, one dtype, Liger installed.

    >>> fit(torch.ones(2, 2))
    False
    """
    first = tensors[0]
    if not first.is_cuda or first.dtype not in DTYPES or first.shape[-1] > WIDEST:
        return False
    same = all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    return same and first.numel() > 0 and _work_on(first.device)


@functools.cache
def _work_on(device: torch.device) -> bool:
    """Returns whether Liger is installed, is the one that this file knows, and compiles here.

    Warns:
        LorakinWarning: it does not, and why.
    """
    try:
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

        unknown = set(liger_cross_entropy_kernel.arg_names) ^ ARGUMENTS_OF_LOSS
        if not unknown:
            with _disable_current_modes():
                ours, one = torch.ops.lorakin, torch.ones(1, 1, device=device)
                ours.gated_backward(ours.gated(one, one), one, one)
                ours.rms_norm_backward(one, one, one[0], ours.rms_norm(one, one[0], 0.0)[1])
            return True
        reason = f"its cross-entropy is not that of liger-kernel 0.8.5: {min(unknown)}"
    except Exception as error:  # Triton, a compiler or a driver may fail in any way
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    warnings.warn(
        f"a fused model is faster on {device} with Liger's kernels ({reason}). Until then torch's "
        "own operations give the same result. Liger comes with pip install 'lorakin[gpu]', and "
        "Triton needs a C compiler, such as gcc",
        LorakinWarning,
        stacklevel=2,
    )
    return False


def _power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@torch.library.impl(LIBRARY, "rms_norm", "CUDA")
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_forward

    y, _, scale, *_ = rms_norm_forward(x.contiguous(), weight, epsilon, 0.0, "llama", None)
    return y, scale


def _gradients_of_norm(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_backward
    from liger_kernel.ops.utils import calculate_settings

    rows = x.contiguous().view(-1, x.shape[-1])
    block, warps = calculate_settings(x.shape[-1])
    for_x, for_weight = rms_norm_backward(
        grad.contiguous(), rows, weight, scale, 0.0, 0, block, warps,
        in_place=False, row_mode=None, needs_dw=needs_weight,
    )  # fmt: skip
    return for_x, for_weight


@torch.library.impl(LIBRARY, "rms_norm_backward", "CUDA")
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return _gradients_of_norm(grad, x, weight, scale, needs_weight=False)[0]


@torch.library.impl(LIBRARY, "rms_norm_backward_of_both", "CUDA")
def _rms_norm_backward_of_both(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _gradients_of_norm(grad, x, weight, scale, needs_weight=True)


@torch.library.impl(LIBRARY, "gated", "CUDA")
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    out: Tensor = swiglu_forward(gate.contiguous(), up.contiguous())[2]
    return out


@torch.library.impl(LIBRARY, "gated_backward", "CUDA")
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from lorakin.kernels.triton_gate import gated_backward_kernel

    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    block = 1024
    with torch.cuda.device(gate.device):
        gated_backward_kernel[(-(-gate.numel() // block),)](
            grad, gate, up, for_gate, for_up, gate.numel(), BLOCK=block
        )
    return for_gate, for_up


@torch.library.impl(LIBRARY, "rotated", "CUDA")
def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    from lorakin.kernels.triton_rotary import rotated_kernel

    rows, heads, length, size = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out, cos, sin = torch.empty_like(x), cos.contiguous(), sin.contiguous()
    with torch.cuda.device(x.device):
        rotated_kernel[(rows * length,)](
            x, cos, sin, out, heads, length, size // 2, *x.stride()[:3], *out.stride()[:3],
            cos.stride(0) if len(cos) > 1 else 0, cos.stride(1),
            BACK=back, HEADS=_power_of_two(heads), HALF=_power_of_two(size // 2),
        )  # fmt: skip
    return out


@torch.library.impl(LIBRARY, "softmax_less_target", "CUDA")
def _softmax_less_target(logits: Tensor, target: Tensor, losses: Tensor, ignored: int) -> None:
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.utils import is_hip

    rows, classes = logits.shape
    block = min(WIDEST_OF_LOSS, _power_of_two(classes))
    unused: dict[str, Any] = {
        "weight_ptr": None, "z_loss_ptr": None, "token_accuracy_ptr": None,
        "token_accuracy_stride": 0, "predicted_tokens_ptr": None, "predicted_tokens_stride": 0,
        "n_non_ignore": 1, "sum_non_ignore_weight": 1, "weight_sum": 0.0, "lse_square_scale": 0.0,
        "label_smoothing": 0.0, "softcap": None, "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False,
    }  # fmt: skip
    with torch.cuda.device(logits.device):
        liger_cross_entropy_kernel[(rows,)](
            X_ptr=logits, X_stride=logits.stride(0), Y_ptr=target, Y_stride=target.stride(0),
            loss_ptr=losses, loss_stride=losses.stride(0), n_cols=classes, ignore_index=ignored,
            reduction="sum", HAS_GRADIENTS=True, BLOCK_SIZE=block,
            num_warps=16 if is_hip() else 32, **unused,
        )  # fmt: skip


def _fake_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    scale = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), scale


def _fake_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_rms_norm_backward_of_both(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return _fake_rms_norm_backward(grad, x, weight, scale), torch.empty_like(weight)


def _fake_gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_gated(gate, up), _fake_gated(up, gate)


def _fake_rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x if x.stride(-1) == 1 else x.contiguous())


def _fake_softmax_less_target(logits: Tensor, target: Tensor, losses: Tensor, ignored: int) -> None:
    return None


FAKES: dict[str, Any] = {
    "rms_norm": _fake_rms_norm,
    "rms_norm_backward": _fake_rms_norm_backward,
    "rms_norm_backward_of_both": _fake_rms_norm_backward_of_both,
    "gated": _fake_gated,
    "gated_backward": _fake_gated_backward,
    "rotated": _fake_rotated,
    "softmax_less_target": _fake_softmax_less_target,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"lorakin::{_name}", _fake, lib=LIBRARY)
