"""Modules that an adapter trains whole (PEFT's `modules_to_save`): its copy answers for the module.

The module stays in its place; the copy hangs beside it in `.lorakin`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lorakin.errors import StateError
from lorakin.inject.attachments import KEY, Adapters, attachments_of, attachments_or_none
from lorakin.inject.callers import first_argument, is_in_forward
from lorakin.inject.class_swap import Swapped

READER_OF_ATTRIBUTE = 2
"""Calls from `_copy_in_use` up to the code that reads: `__getattr__`, the code."""
READER_OF_SEQUENCE = 3
"""Calls from `_copy_in_use` up to the code that reads: `_parts`, `__iter__`, the code."""


class Replaced(Swapped):
    """Mixed in before the class of a module that an adapter trains whole: its copy is used.

    That holds also for code in a forward that reads the module's tensors and parts, or calls
    another of its methods.
    """

    lorakin: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attached = attachments_of(self)
        if attached.mixed_batch is None and (copies := attached.in_use()):
            # `.forward`, not a call: the hooks of the replaced module already run around this.
            return copies[0].module.forward(*args, **kwargs)
        attached.forward_depth += 1
        try:
            out = super().forward(*args, **kwargs)
        finally:
            attached.forward_depth -= 1
        if attached.mixed_batch is None:
            return out
        return attached.mixed_batch.replaced(self, out, first_argument(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        if name != KEY and (copy := _copy_in_use(self, READER_OF_ATTRIBUTE)) is not None:
            return getattr(copy, name)
        return super().__getattr__(name)


class ReplacedSequence(Replaced):
    """`Replaced` for nn.Sequential, whose parts are its children without the adapters."""

    def _parts(self) -> list[nn.Module]:
        copy = _copy_in_use(self, READER_OF_SEQUENCE)
        children = (self if copy is None else copy)._modules
        return [child for key, child in children.items() if key != KEY and child is not None]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())

    def __getitem__(self, index: Any) -> Any:
        parts = self._parts()[index]
        return nn.Sequential(*parts) if isinstance(index, slice) else parts


def _copy_in_use(module: Replaced, depth: int) -> nn.Module | None:
    """Returns the copy to use instead of `module`, if the code `depth` calls above computes."""
    attached = attachments_or_none(module)
    if (
        attached is None
        or attached.forward_depth
        or not (copies := attached.in_use())
        or not is_in_forward(depth)
    ):
        return None
    if attached.mixed_batch is not None:
        raise StateError(
            f"a {type(module).__name__} that is trained whole is read without being called, so it "
            "cannot be in a mixed batch"
        )
    copy: nn.Module = copies[0].module
    return copy
