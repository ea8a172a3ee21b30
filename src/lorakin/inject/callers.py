"""Who reads a tensor of a module: a forward that computes with it, or what looks after parameters.

The call stack tells: a forward runs inside some module's call.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__
COMPUTING = ("torch.utils.checkpoint", "torch.autograd.function")
"""Modules that run part of a forward again in the backward, with no module's call around it."""
MACHINERY = (
    "accelerate",
    "deepspeed",
    "lorakin",
    "torch.distributed",
    "torch.nn.modules.module",
    "torch.nn.utils",
)
"""Packages that look after parameters, also during a forward, and compute nothing with them."""


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the first argument of a call, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def is_in_forward(depth: int) -> bool:
    """Returns whether the function `depth` calls above the caller computes with what it reads.

    >>> is_in_forward(0)
    False
    """
    # Compiled code is a forward, and has no frames.
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(depth + 1)
    assert frame is not None
    reader = frame.f_globals.get("__name__", "")
    # `startswith` alone is quick, and true for few readers.
    if reader.startswith(MACHINERY) and any(
        reader == name or reader.startswith(name + ".") for name in MACHINERY
    ):
        return False
    while frame is not None:
        if frame.f_code is _CALL or frame.f_globals.get("__name__") in COMPUTING:
            return True
        frame = frame.f_back
    return False
