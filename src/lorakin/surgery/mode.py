"""Train and eval mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside, the mode there was before outside."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
