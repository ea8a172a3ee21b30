"""Files of the same model in another class, such as without its head: paths begin otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lorakin.inject import layer_kinds


class Prefix(NamedTuple):
    """What paths begin with in the file and in the model; each is empty or ends with a dot."""

    there: str
    here: str

    @property
    def advice(self) -> str:
        """What to do about it."""
        if not self.there:
            inner = self.here.removesuffix(".")
            return (
                f"It was made on the part of it that is {inner!r}: load it into that, "
                f"model.get_submodule({inner!r})"
            )
        if not self.here:
            outer = self.there.removesuffix(".")
            return (
                f"It was made on a model that holds this one as {outer!r}, such as one with a "
                "head: load it into that"
            )
        return "Load it into a model of the class that it was made on"


def other_prefix(
    slots: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module]
) -> Prefix | None:
    """The beginnings that turn every path of the file into that of a fitting module, or None."""
    first = next(iter(slots), "")
    parts = first.split(".")
    for n in range(len(parts) - 1):  # at least two names stay, so that a mere "dense" says nothing
        there, rest = "".join(f"{part}." for part in parts[:n]), ".".join(parts[n:])
        for path in modules:
            if path == rest or path.endswith(f".{rest}"):
                prefix = Prefix(there, path.removesuffix(rest))
                if all(_fits(prefix, path, own, modules) for path, own in slots.items()):
                    return prefix
    return None


def _fits(
    prefix: Prefix, path: str, slots: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> bool:
    module = (
        modules.get(prefix.here + path.removeprefix(prefix.there))
        if path.startswith(prefix.there)
        else None
    )
    kind = None if module is None else layer_kinds.kind_of(module)
    if module is None or kind is None:
        return False
    down = slots.get("A")
    return down is None or down.dim() < 2 or kind.shape(module).inputs == down.flatten(1).shape[1]
