"""DoRA's row norms and the gradient of a gain as Triton kernels.

`kernels/triton_operators.py` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_norms_kernel(
    weight: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    rank: tl.tensor,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """Writes ‖w_j + scale · up_j down‖ of OUTPUTS rows, (outputs,) float32.

    The sum itself is never stored.
    """
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, RANK)
    left = tl.load(
        up + row[:, None] * rank + k[None, :],
        mask=(row[:, None] < outputs) & (k[None, :] < rank),
        other=0.0,
    )
    squares = tl.zeros((OUTPUTS,), tl.float32)
    for start in range(0, inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        right = tl.load(
            down + k[:, None] * inputs + column[None, :],
            mask=(k[:, None] < rank) & (column[None, :] < inputs),
            other=0.0,
        )
        inside = (row[:, None] < outputs) & (column[None, :] < inputs)
        at = row[:, None].to(tl.int64) * inputs + column[None, :]
        changed = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        changed += scale * tl.dot(left, right, input_precision="ieee")
        squares += tl.sum(changed * changed, axis=1)
    tl.store(out + row, tl.sqrt(squares), mask=row < outputs)


@triton.jit(do_not_specialize=["rows"])
def gain_gradient_kernel(
    delta: tl.tensor,
    multiplied: tl.tensor,
    bias: tl.tensor,
    gain_minus_one: tl.tensor,
    gained: tl.tensor,
    less: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    rows_of_a_part: tl.tensor,
    HAS_BIAS: tl.constexpr,
    WRITES_LESS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """Writes g ⊙ δ, perhaps (g − 1) ⊙ δ, and Σ δ ⊙ (multiplied − b) over a part of the rows.

    The sums are (parts, outputs), float32.
    """
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_column = column < outputs
    factor = tl.load(gain_minus_one + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)
    else:
        offset = tl.zeros((OUTPUTS,), tl.float32)
    total = tl.zeros((OUTPUTS,), tl.float32)
    first = tl.program_id(1) * rows_of_a_part
    for start in range(first, min(first + rows_of_a_part, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & is_column[None, :]
        at = row[:, None].to(tl.int64) * outputs + column[None, :]
        d = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(multiplied + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(d * (v - offset[None, :]), axis=0)
        change = d * factor[None, :]
        tl.store(gained + at, (d + change).to(gained.dtype.element_ty), mask=inside)
        if WRITES_LESS:
            tl.store(less + at, change.to(less.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(1) * outputs + column, total, mask=is_column)
