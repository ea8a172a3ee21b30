"""A tensor in a line of text: a checksum, and sums that rounding hardly moves.

    float32 9f2c41aa 12.03 -0.1182 …        held dtype, CRC-32, norm, then r_kᵀ W c_k for k = 1 … 8

r_k and c_k are vectors of signs that a hash draws, always the same ones for a length. For a
difference D between two tensors r_kᵀ D c_k has the mean 0 and the variance ‖D‖², whatever D is. So
the mean square of the eight estimates ‖D‖² over all values of the tensors. The CRC is taken of the
values in the narrowest dtype that holds all of them (the "held dtype"), so it does not depend on
the dtype that the model is run in. If both sides have the same held dtype, nothing was rounded, and
the CRCs must agree. If not, one side was rounded, and the sums are compared: rounding to a dtype
with the unit roundoff u changes each value by at most the factor u (Higham, Accuracy and Stability
of Numerical Algorithms, 2002, section 2.1), so ‖D‖ ≤ u‖W‖.

A bfloat16 tensor that was run in float16 has lost the last bits of its smallest values, and its
held dtype is bfloat16 still. So tensors of half precision have a second CRC after the first, of the
values that float16 holds in full: of values with 8 bits those from 2⁻¹⁷ on. That one must agree.

It is one pass over the weights: a second for SmolLM2's 135 million float32 values on one core.
"""

from __future__ import annotations

import functools
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

COUNT = 8
"""The number of sums of a parameter."""
CHUNK = 2**22
"""The number of values that are read at a time."""
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*PRECISIONS, torch.float64)
ROUNDINGS = 2**-8 + 2**-10
"""Relative: one rounding to bfloat16, and one to float16 on the way or on the other side."""
TAIL = 2.5
"""The factor by which the estimate of ‖D‖ may be too large.

Eight normal sums are off by so much once in 10⁷ cases, and values round to less than half of the
bound on average.
"""
HALF = (torch.bfloat16, torch.float16)
"""Dtypes with a second checksum."""
LEAST_IN_FULL = 2.0**-16
"""The least value that counts in the second checksum: 2⁻¹⁷ lies below."""
TINY = 1e-7
"""Absolute, for each value: less than a float16 can hold."""


def lines_of(
    weights: Mapping[str, Tensor],
    trained: Mapping[str, Sequence[int]],
    reuse_unchanged: bool = False,
) -> dict[str, str]:
    """Returns the line of each parameter that has plain values, by name.

    Args:
        weights: by name; one with two names, such as a tied one, is read once.
        trained: parameter → ids of the rows that an adapter trains, which are left out, as are
            those behind the last of them.
        reuse_unchanged: reuse the line of a tensor that was read before and not written to since,
            by autograd's version counter. For the many saves of one training; a write through
            `.data` is not noticed.
    """
    computed: dict[tuple[int, tuple[int, ...]], str | None] = {}
    for name, weight in weights.items():
        key = id(weight), tuple(trained.get(name, ()))
        if key not in computed:
            stamp = key[1], weight._version, weight.dtype, weight.device
            remembered = _lines_read.get(weight) if reuse_unchanged else None
            if remembered is not None and remembered[0] == stamp:
                computed[key] = remembered[1]
            else:
                computed[key] = line_of(weight, key[1])
            _lines_read[weight] = stamp, computed[key]
    lines = {
        name: computed[id(weight), tuple(trained.get(name, ()))] for name, weight in weights.items()
    }
    return {name: line for name, line in lines.items() if line is not None}


_lines_read: Any = WeakTensorKeyDictionary()


def line_of(weight: Tensor, trained: Sequence[int] = ()) -> str | None:
    """Returns a tensor's line; None if it is sharded, quantised, empty, on meta or not finite."""
    weight = weight.detach()
    plain = type(weight) is Tensor and not weight.is_meta and weight.dtype in FLOATS
    if trained and plain:
        kept = sorted(set(range(max(trained))) - set(trained))
        weight = weight[torch.tensor(kept, dtype=torch.long, device=weight.device)]
    if not plain or not weight.numel():
        return None
    matrix = weight.reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    height = max(1, CHUNK // matrix.shape[1])
    parts = [matrix[start : start + height] for start in range(0, len(matrix), height)]
    held_dtype = next(
        (dtype for dtype in PRECISIONS if all(_holds(dtype, part) for part in parts)), weight.dtype
    )
    checksum, second, square = 0, 0, 0.0
    total = torch.zeros(COUNT, dtype=torch.float64)
    left, right = _signs("rows", len(matrix)), _signs("columns", matrix.shape[1])
    for start, part in zip(range(0, len(matrix), height), parts, strict=True):
        exact = part.to(held_dtype).contiguous().cpu()
        checksum = _crc(exact, checksum)
        if held_dtype in HALF:
            second = _crc(exact.masked_fill(exact.abs() < LEAST_IN_FULL, 0), second)
        wide = part if part.dtype == torch.float64 else part.float()
        square += float(torch.linalg.vector_norm(wide)) ** 2
        sums = (wide @ right.to(wide)).cpu().double()
        total += (left[start : start + len(part)] * sums).sum(0)
    figures = math.sqrt(square), *total.tolist()
    if not all(map(math.isfinite, figures)):
        return None
    numbers = " ".join(f"{number:.7g}" for number in figures)
    checksums = f"{checksum:08x}{second:08x}" if held_dtype in HALF else f"{checksum:08x}"
    return f"{str(held_dtype).removeprefix('torch.')} {checksums} {numbers}"


def _crc(exact: Tensor, before: int) -> int:
    return zlib.crc32(exact.view(-1).view(torch.uint8).numpy().data, before)


def _holds(dtype: torch.dtype, part: Tensor) -> bool:
    return part.dtype == dtype or torch.equal(part.to(dtype).to(part.dtype), part)


@functools.lru_cache(maxsize=64)
def _signs(what: str, length: int) -> Tensor:
    """Returns signs (length, COUNT), float64, from a hash, so that no library's version matters."""
    random_bytes = hashlib.shake_128(f"{what} {length}".encode()).digest(length)
    bits = torch.frombuffer(bytearray(random_bytes), dtype=torch.uint8).view(-1, 1) >> torch.arange(
        COUNT, dtype=torch.uint8
    )
    return (bits & 1).double() * 2 - 1


def distance(then: str | None, now: str | None) -> float:
    """Returns the relative distance of two tensors by their lines; 0 if rounding explains it.

    It is also 0 if one has no line, as in files of earlier versions.
    """
    if then is None or now is None or then == now:
        return 0.0
    (dtype, checksum, *before), (dtype_now, checksum_now, *after) = then.split(), now.split()
    # Earlier versions wrote one checksum, of 8 digits; the second is the one that must agree.
    have_second = min(len(checksum), len(checksum_now)) > 8
    compared = slice(8, None) if have_second else slice(8)
    if dtype == dtype_now and checksum[compared] == checksum_now[compared]:
        return 0.0
    (size, *old), (_, *new) = ([float(number) for number in line] for line in (before, after))
    gap = math.hypot(*(a - b for a, b in zip(old, new, strict=True))) / math.sqrt(COUNT)
    # Nothing was rounded, and still the bits differ.
    if dtype == dtype_now and (have_second or dtype not in ("bfloat16", "float16")):
        return max(gap / max(size, 1e-30), 1e-9)
    allowed = TAIL * ROUNDINGS * size + TINY
    return 0.0 if gap <= allowed else gap / max(size, 1e-30)


def is_line(text: object) -> bool:
    """Returns whether a value from a file has the form of a line."""
    parts = text.split() if isinstance(text, str) else []
    try:
        return (
            len(parts) == 3 + COUNT
            and int(parts[1], 16) >= 0
            and all(math.isfinite(float(part)) for part in parts[2:])
        )
    except ValueError:
        return False
