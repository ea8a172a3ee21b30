"""Who reads a tensor of a module: a forward, or what looks after parameters.

The difference is where the reader stands: in the forward of some module, or outside of all of them.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__
COMPUTING = ("torch.utils.checkpoint", "torch.autograd.function")
"""Where a part of a forward is run again in the backward, with no module's call around it."""
MACHINERY = (
    "accelerate",
    "deepspeed",
    "lorakin",
    "torch.distributed",
    "torch.nn.modules.module",
    "torch.nn.utils",
)
"""Packages that look after parameters, also during a forward, and compute nothing with them."""


def is_in_forward(depth: int) -> bool:
    """Whether a tensor is read to compute with, by the function `depth` calls above the caller."""
    if torch.compiler.is_compiling():  # what is compiled is a forward, and has no frames to look at
        return True
    frame: FrameType | None = sys._getframe(depth + 1)
    assert frame is not None
    reader = frame.f_globals.get("__name__", "")
    if reader.startswith(MACHINERY) and any(
        reader == name or reader.startswith(name + ".") for name in MACHINERY
    ):
        return False
    while frame is not None:
        if frame.f_code is _CALL or frame.f_globals.get("__name__") in COMPUTING:
            return True
        frame = frame.f_back
    return False
