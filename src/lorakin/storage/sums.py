"""A tensor in a line of text: a checksum, and sums that rounding hardly moves.

    float32 9f2c41aa 12.03 -0.1182 …        held dtype, CRC-32, norm, then r_kᵀ W c_k for k = 1 … 8

r_k and c_k are vectors of signs that a hash draws, always the same ones for a length. For a
difference D between two tensors r_kᵀ D c_k has the mean 0 and the variance ‖D‖², whatever D is, so
the mean square of the eight is an estimate of how far the tensors are apart in all of their
numbers. The CRC is over the numbers in the narrowest dtype that holds all of them, so it does not
depend on the one that the model is run in. Where both sides are held in the same dtype the CRCs
must agree: nothing was rounded. Where they are held in others, because one side was rounded, the
sums are compared: rounding to a dtype with the unit roundoff u moves each number by at most u of
itself (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.1), so ‖D‖ ≤ u‖W‖.

A bfloat16 that was run in float16 has lost the last bits of its smallest numbers, and is held in
bfloat16 still. So of a half precision there is a second CRC, behind the first, over the numbers
that float16 holds in full: of numbers with 8 bits those from 2⁻¹⁷ on. That one must agree.

One pass over the weights: a second for SmolLM2's 135 million numbers in float32 on one core.
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
"""How many sums a parameter has."""
CHUNK = 2**22
"""How many numbers are read at a time."""
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32)
NUMBERS = (*PRECISIONS, torch.float64)
ROUNDINGS = 2**-8 + 2**-10
"""Relative: one rounding to bfloat16, and one to float16 on the way or on the other side."""
TAIL = 2.5
"""How many times too large the estimate may be.

Eight normal sums are so far off once in 10⁷, and numbers round to less than half of the bound on
average.
"""
HALF = (torch.bfloat16, torch.float16)
"""Dtypes with a second checksum."""
WHOLE = 2.0**-16
"""The least number that counts in the second checksum: 2⁻¹⁷ lies below."""
TINY = 1e-7
"""Absolute, for each number: less than a float16 can hold."""


def of_all(
    weights: Mapping[str, Tensor], trained: Mapping[str, Sequence[int]], again: bool = False
) -> dict[str, str]:
    """The line of each parameter that has plain numbers.

    Args:
        weights: by name; one that stands there under two names, as tied ones do, is read once.
        trained: parameter → ids of the rows that an adapter trains, which are left out, as are
            those behind the last of them.
        again: take the line of a tensor that was read before and not written to since, as autograd
            counts it. For the many saves of one training; writing past autograd is not seen.
    """
    made: dict[tuple[int, tuple[int, ...]], str | None] = {}
    for name, weight in weights.items():
        key = id(weight), tuple(trained.get(name, ()))
        if key not in made:
            stamp = key[1], weight._version, weight.dtype, weight.device
            before = _before.get(weight) if again else None
            made[key] = (
                before[1] if before is not None and before[0] == stamp else of(weight, key[1])
            )
            _before[weight] = stamp, made[key]
    lines = {
        name: made[id(weight), tuple(trained.get(name, ()))] for name, weight in weights.items()
    }
    return {name: line for name, line in lines.items() if line is not None}


_before: Any = WeakTensorKeyDictionary()


def of(weight: Tensor, trained: Sequence[int] = ()) -> str | None:
    """A tensor's line; None if it is sharded, quantised, empty, without values or not finite."""
    weight = weight.detach()
    plain = type(weight) is Tensor and not weight.is_meta and weight.dtype in NUMBERS
    if trained and plain:
        kept = sorted(set(range(max(trained))) - set(trained))
        weight = weight[torch.tensor(kept, dtype=torch.long, device=weight.device)]
    if not plain or not weight.numel():
        return None
    matrix = weight.reshape(weight.shape[0] if weight.dim() > 1 else 1, -1)
    height = max(1, CHUNK // matrix.shape[1])
    parts = [matrix[start : start + height] for start in range(0, len(matrix), height)]
    held = next(
        (dtype for dtype in PRECISIONS if all(_holds(dtype, part) for part in parts)), weight.dtype
    )
    checksum, larger, square = 0, 0, 0.0
    total = torch.zeros(COUNT, dtype=torch.float64)
    left, right = _signs("rows", len(matrix)), _signs("columns", matrix.shape[1])
    for number, part in enumerate(parts):
        exact = part.to(held).contiguous().cpu()
        checksum = _crc(exact, checksum)
        if held in HALF:
            larger = _crc(exact.masked_fill(exact.abs() < WHOLE, 0), larger)
        wide = part if part.dtype == torch.float64 else part.float()
        square += float(torch.linalg.vector_norm(wide)) ** 2
        sums = (wide @ right.to(wide)).cpu().double()
        total += (left[number * height : number * height + len(part)] * sums).sum(0)
    said = math.sqrt(square), *total.tolist()
    if not all(map(math.isfinite, said)):
        return None
    numbers = " ".join(f"{number:.7g}" for number in said)
    checksums = f"{checksum:08x}{larger:08x}" if held in HALF else f"{checksum:08x}"
    return f"{str(held).removeprefix('torch.')} {checksums} {numbers}"


def _crc(exact: Tensor, before: int) -> int:
    return zlib.crc32(exact.view(-1).view(torch.uint8).numpy().data, before)


def _holds(dtype: torch.dtype, part: Tensor) -> bool:
    return part.dtype == dtype or torch.equal(part.to(dtype).to(part.dtype), part)


@functools.lru_cache(maxsize=64)
def _signs(what: str, length: int) -> Tensor:
    """Signs (length, COUNT), float64, from a hash: the same in every version of every library."""
    drawn = hashlib.shake_128(f"{what} {length}".encode()).digest(length)
    bits = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(-1, 1) >> torch.arange(
        COUNT, dtype=torch.uint8
    )
    return (bits & 1).double() * 2 - 1


def apart(then: str | None, now: str | None) -> float:
    """How far two tensors are apart by their lines, relative to the first.

    0 if rounding explains it.

    It is 0 also where one has no line: what earlier versions wrote has none.
    """
    if then is None or now is None or then == now:
        return 0.0
    (held, checksum, *before), (other, checksum_now, *after) = then.split(), now.split()
    both = min(len(checksum), len(checksum_now)) > 8  # earlier versions wrote one
    if held == other and (
        checksum[8:] == checksum_now[8:] if both else checksum[:8] == checksum_now[:8]
    ):
        return 0.0
    (size, *old), (_, *new) = ([float(number) for number in numbers] for numbers in (before, after))
    gap = math.hypot(*(a - b for a, b in zip(old, new, strict=True))) / math.sqrt(COUNT)
    # Nothing was rounded, and still the bits differ.
    if held == other and (both or held not in ("bfloat16", "float16")):
        return max(gap / max(size, 1e-30), 1e-9)
    allowed = TAIL * ROUNDINGS * size + TINY
    return 0.0 if gap <= allowed else gap / max(size, 1e-30)


def is_sum(text: object) -> bool:
    """Whether this, from a file, has the form that `of` gives."""
    parts = text.split() if isinstance(text, str) else []
    try:
        return (
            len(parts) == 3 + COUNT
            and int(parts[1], 16) >= 0
            and all(math.isfinite(float(part)) for part in parts[2:])
        )
    except ValueError:
        return False
