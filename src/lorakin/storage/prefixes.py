"""Adapters made on the same model in another class, such as without its head.

Their paths have another prefix: `layers.0.…` in the file, `model.layers.0.…` in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lorakin.inject import layer_kinds
from lorakin.storage.peft.formats import DOWN


class Prefix(NamedTuple):
    """The prefixes of paths in the file and in the model; each is empty or ends with a dot."""

    in_file: str
    in_model: str

    @property
    def advice(self) -> str:
        """The advice for an error message."""
        if not self.in_file:
            inner = self.in_model.removesuffix(".")
            return (
                f"It was made on the part of it that is {inner!r}: load it into that, "
                f"model.get_submodule({inner!r})"
            )
        if not self.in_model:
            outer = self.in_file.removesuffix(".")
            return (
                f"It was made on a model that holds this one as {outer!r}, such as one with a "
                "head: load it into that"
            )
        return "Load it into a model of the class that it was made on"


def other_prefix(
    slots: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module]
) -> Prefix | None:
    """Returns the prefixes that turn every path of the file into that of a fitting module."""
    first = next(iter(slots), "")
    parts = first.split(".")
    for n in range(len(parts) - 1):  # at least two names stay, so that a mere "dense" says nothing
        in_file, rest = "".join(f"{part}." for part in parts[:n]), ".".join(parts[n:])
        for path in modules:
            if path == rest or path.endswith(f".{rest}"):
                prefix = Prefix(in_file, path.removesuffix(rest))
                if all(_fits(prefix, old, slots[old], modules) for old in slots):
                    return prefix
    return None


def _fits(
    prefix: Prefix, path: str, slots: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> bool:
    if not path.startswith(prefix.in_file):
        return False
    module = modules.get(prefix.in_model + path.removeprefix(prefix.in_file))
    kind = None if module is None else layer_kinds.kind_of(module)
    if module is None or kind is None:
        return False
    down = slots.get(DOWN)
    return down is None or down.dim() < 2 or kind.shape(module).inputs == down.flatten(1).shape[1]
