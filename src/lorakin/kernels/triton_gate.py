"""The gradients of silu(gate) · up as one Triton kernel, which `liger_operators.py` launches.

Liger's own writes them over gate and up.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["numbers"])  # type: ignore[untyped-decorator]
def gated_backward_kernel(
    grad: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    for_gate: tl.tensor,
    for_up: tl.tensor,
    numbers: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the gradients of gate and up, computed in float32; all are of one contiguous shape."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(g)
    silu = g * share
    # silu'(g) = σ(g) + silu(g) (1 − σ(g))
    slope = share + silu * (1 - share)
    tl.store(for_gate + at, (d * u * slope).to(for_gate.dtype.element_ty), mask=inside)
    tl.store(for_up + at, (d * silu).to(for_up.dtype.element_ty), mask=inside)
