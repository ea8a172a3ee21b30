"""Memory in words and on this machine."""

from __future__ import annotations

import re

import psutil
import torch

from lorakin.errors import SettingError

CUDA_CONTEXT = 2**29
"""The bytes that CUDA takes on a GPU before the first tensor. Assumed, not measured."""
UNITS = {
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_memory(text: str) -> int:
    """Returns the bytes of a size in words.

    >>> parse_memory("24GB"), parse_memory("1.5 GiB")
    (24000000000, 1610612736)

    Raises:
        SettingError: the text has another form, or no unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)b?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SettingError(
            f"memory must be a size with its unit, such as 24GB, 24GiB or 24000MB, not {text!r}"
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def size(count: int) -> str:
    """Writes a number of bytes with three digits.

    >>> size(1_500_000_000), size(134_000_000)
    ('1.5 GB', '134 MB')
    """
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if amount >= 99.5 or unit == "B" else f"{amount:.3g} {unit}"


def available_memory(device: str) -> int | None:
    """Returns the bytes that are free on "cuda" or "cpu"; None if there is no such GPU."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def imported_bytes(device: str) -> int:
    """Returns what a process holds before a run begins.

    On a CPU these are the imported libraries, measured in this process; on a GPU, CUDA's context.
    """
    return int(psutil.Process().memory_info().rss) if device == "cpu" else CUDA_CONTEXT


def available_of(device: str, imported: int) -> int | None:
    """Returns the bytes that a run on `device` could have, with what it imports.

    Args:
        device: "cpu" or "cuda".
        imported: `imported_bytes(device)`. On a CPU this process holds them already; the run
            would hold them in its place.
    """
    free = available_memory(device)
    return None if free is None else free + (imported if device == "cpu" else 0)
