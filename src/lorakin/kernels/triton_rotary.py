"""Rotary position embedding as a Triton kernel, which `liger_operators.py` launches.

Liger's writes over its input, which adapters and hooks may still read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def rotated_kernel(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    half: tl.tensor,
    x_row: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    out_token: tl.tensor,
    angle_row: tl.tensor,
    angle_token: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Rotates all heads of one token, or rotates a gradient back; computed in float32.

    x and out are (rows, heads, length, 2 · half), cos and sin (rows, length, 2 · half).
    """
    row, token = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    head, entry = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, HALF)
    is_entry = entry < half
    inside = (head[:, None] < heads) & is_entry[None, :]
    angle = row * angle_row + token * angle_token + entry
    cos_1 = tl.load(cos + angle, mask=is_entry, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + angle + half, mask=is_entry, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + angle, mask=is_entry, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + angle + half, mask=is_entry, other=0.0).to(tl.float32)[None, :]

    from_x = x + row * x_row + token * x_token + head[:, None] * x_head + entry[None, :]
    x_1 = tl.load(from_x, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(from_x + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
    to_y = out + row * out_row + token * out_token + head[:, None] * out_head + entry[None, :]
    tl.store(to_y, y_1.to(out.dtype.element_ty), mask=inside)
    tl.store(to_y + half, y_2.to(out.dtype.element_ty), mask=inside)
