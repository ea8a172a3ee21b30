"""What preference tuning compares the model with: its base, or the adapter that it began with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from lorakin.inject.module_mode import in_mode
from lorakin.inject.reference import reference
from lorakin.switching import activate, adapters

REFERENCE = "reference"
"""The name of a frozen copy of the adapter that a run trains further."""


@contextlib.contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Makes a model the one that its answers are compared with, inside a `with` block.

    That is the base or, if the model has an adapter `REFERENCE`, the base with it.
    """
    named = adapters(model)
    if REFERENCE not in named:
        with contextlib.ExitStack() as off:
            for adapter in named.values():
                off.enter_context(adapter.disabled())
            yield
        return
    before = [name for name, adapter in named.items() if adapter.is_active]
    activate(model, REFERENCE)
    try:
        yield
    finally:
        activate(model, before)


def reference_view(model: nn.Module) -> Any:
    """Returns another object with the same parameters that answers as the reference does.

    It is in eval mode when it is called: without dropout and without noise on the embeddings.
    """
    view: Any = reference(model)
    view.__class__ = type("ReferenceView", (_AsReference, type(view)), {})
    return view


class _AsReference:
    """Mixed in before a `Reference`: in eval mode, with the adapter that the run began with."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = vars(self)["_adapted"]
        with as_reference(model), in_mode(model, training=False):
            return nn.Module.__call__(self, *args, **kwargs)
