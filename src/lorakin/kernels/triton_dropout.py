"""Dropout inside Triton kernels: what is dropped is computed from the seed where it is needed.

A mask that a kernel writes and another reads costs as much memory traffic as the input itself, and
an adapter's product with the input does little else than read it. So each kernel here draws for
itself. `kernels/triton_operators.py` launches them.

Philox with 7 rounds, the fewest that pass all of TestU01 ("Parallel Random Numbers: As Easy as
1, 2, 3", 2011), gives four words for a row and eight columns. Each half word decides one entry.

Triton compiles again where a number becomes 1 or divisible by 16, which tells it nothing where no
address is computed from the number. So seeds and numbers of tokens, which change with each step,
are not specialised, here and in the other files of kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(7)
GROUP: tl.constexpr = tl.constexpr(8)
"""The columns that one draw of four words decides."""


@triton.jit
def is_kept(seed: tl.tensor, threshold: tl.tensor, rows: tl.tensor, groups: tl.tensor) -> tl.tensor:
    """Returns which entries are kept, (ROWS, 8 · GROUPS), for rows (ROWS,) and groups (GROUPS,)."""
    row, group = rows[:, None], groups[None, :]
    zero = tl.zeros_like(row + group)
    first, second, third, fourth = tl.philox(seed, row + zero, group + zero, zero, zero, ROUNDS)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))  # (…, 2, 2), in order
    words = words.reshape(rows.shape[0], groups.shape[0] * 4)
    halves = tl.join(words & 0xFFFF, words >> 16).reshape(rows.shape[0], groups.shape[0] * 8)
    return halves.to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["seed", "threshold", "rows"])
def zeroed_kernel(
    x: tl.tensor,
    out: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Writes x with zeros at the dropped entries, for a block of ROWS × COLUMNS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0)
    values = tl.where(is_kept(seed, threshold, row, group), values, 0.0)
    tl.store(out + at, values, mask=inside)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(
    parts: tl.tensor, out: tl.tensor, count: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Writes BLOCK numbers of the sum over `parts` (count, size), in the dtype of `out`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["seed", "threshold", "rows"])
def product_kernel(
    x: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    rank: tl.tensor,
    inputs_of_a_part: tl.tensor,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """Writes ROWS rows of x̃ downᵀ over a part of the inputs, (parts, rows, rank)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    first = tl.program_id(1) * inputs_of_a_part
    for start in range(first, min(first + inputs_of_a_part, inputs), INPUTS):
        column = start + tl.arange(0, INPUTS)
        group = start // GROUP + tl.arange(0, INPUTS // GROUP)
        inside = (row[:, None] < rows) & (column[None, :] < inputs)
        at = row[:, None].to(tl.int64) * inputs + column[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        values = tl.where(is_kept(seed, threshold, row, group), values, 0.0).to(values.dtype)
        across = tl.load(
            down + k[None, :] * inputs + column[:, None],
            mask=(k[None, :] < rank) & (column[:, None] < inputs),
            other=0.0,
        )
        total = tl.dot(values, across, total, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * rows * rank
    at = part + row[:, None].to(tl.int64) * rank + k[None, :]
    inside = (row[:, None] < rows) & (k[None, :] < rank)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold", "rows"])
def down_gradient_kernel(
    back: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    rank: tl.tensor,
    rows_of_a_part: tl.tensor,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """Writes INPUTS columns of scale · backᵀ x̃ over a part of the rows, (parts, rank, inputs)."""
    column = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    group = tl.program_id(0) * (INPUTS // GROUP) + tl.arange(0, INPUTS // GROUP)
    k = tl.arange(0, RANK)
    total = tl.zeros((RANK, INPUTS), tl.float32)
    first = tl.program_id(1) * rows_of_a_part
    for start in range(first, min(first + rows_of_a_part, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < inputs)
        at = row[:, None].to(tl.int64) * inputs + column[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        values = tl.where(is_kept(seed, threshold, row, group), values, 0.0).to(values.dtype)
        across = tl.load(
            back + row[None, :].to(tl.int64) * rank + k[:, None],
            mask=(k[:, None] < rank) & (row[None, :] < rows),
            other=0.0,
        )
        total = tl.dot(across, values, total, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * rank * inputs
    at = part + k[:, None] * inputs + column[None, :]
    inside = (k[:, None] < rank) & (column[None, :] < inputs)
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "threshold", "rows"])
def input_product_kernel(
    back: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    seed: tl.tensor,
    threshold: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    rank: tl.tensor,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """Writes a block of scale · back down, (rows, inputs), with zeros where x was dropped."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    group = tl.program_id(1) * (INPUTS // GROUP) + tl.arange(0, INPUTS // GROUP)
    k = tl.arange(0, RANK)
    left = tl.load(
        back + row[:, None].to(tl.int64) * rank + k[None, :],
        mask=(row[:, None] < rows) & (k[None, :] < rank),
        other=0.0,
    )
    right = tl.load(
        down + k[:, None] * inputs + column[None, :],
        mask=(k[:, None] < rank) & (column[None, :] < inputs),
        other=0.0,
    )
    product = tl.dot(left, right, input_precision="ieee") * scale
    product = tl.where(is_kept(seed, threshold, row, group), product, 0.0)
    inside = (row[:, None] < rows) & (column[None, :] < inputs)
    at = row[:, None].to(tl.int64) * inputs + column[None, :]
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)
