"""A gated activation that keeps its two inputs and nothing else.

Layers that need its output in the backward compute it again (`recomputation.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.autograd import backward_once
from lorakin.kernels.liger_operators import fit
from lorakin.kernels.recomputation import Recomputation


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) · up, on a GPU by Liger's kernel, where it is installed.

    >>> gated_silu(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 3.0]))
    tensor([0.0000, 2.1932])
    """
    with_liger = fit(gate, up)
    function, make = (LigerGate, torch.ops.lorakin.gated) if with_liger else (Gate, gated)
    out: Tensor = function.apply(gate, up)  # type: ignore[no-untyped-call]
    return Recomputation.attach(out, make, (gate, up))


class Gate(torch.autograd.Function):
    """silu(gate) · up by torch's operations."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Computes the output of `Gate`."""
    return F.silu(gate).mul_(up)


class LigerGate(torch.autograd.Function):
    """silu(gate) · up, one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.lorakin.gated(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @backward_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        for_gate, for_up = torch.ops.lorakin.gated_backward(grad, *ctx.saved_tensors)
        return for_gate, for_up
