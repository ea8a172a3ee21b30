"""Changing the class of one module and giving it back: how everything in this room is mixed into a model."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from lorakin.errors import StateError


class Swapped(nn.Module):
    """Whatever is mixed in before a module's own class: the class is made at run time, so copies name the own one instead."""

    @staticmethod
    def beneath(base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """What is mixed in after a module's own class `base`, to be found by the calls of `super()` in it."""
        return ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return revive, (type(self).__bases__[0], base_class(self)), self.__dict__


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before the latest of what was mixed in."""
    cls = type(module)
    if not isinstance(module, Swapped):
        return cls
    if cls not in _CLASSES.values():
        raise StateError(
            f"the class of an adapted {cls.__name__} was changed after it was adapted, by parametrizing or sharding it, say; "
            "undo that first"
        )
    return cls.__bases__[1]


def unmix(module: nn.Module, *mixins: type[nn.Module]) -> None:
    """Take one of these out of the module's class, whatever was mixed in after it."""

    def without(cls: type[nn.Module]) -> type[nn.Module]:
        mixin, base = cls.__bases__[:2]
        return base if mixin in mixins else combined(mixin, without(base))

    base_class(module)  # which says it if the class is no longer one of ours
    swap_class(module, without(type(module)))


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the module's class, also for the hooks with which Accelerate spreads a model over devices.

    Those shadow `forward` on the instance and call `_old_forward`, the method of the class that the module had then.
    """
    module.__class__ = cls
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(cls.forward, module)


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def combined(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of `mixin` and `base`."""
    if (mixin, base) not in _CLASSES:
        name = f"{mixin.__name__}{base.__name__}"
        beneath = mixin.beneath(base) if issubclass(mixin, Swapped) else ()
        _CLASSES[mixin, base] = type(name, (mixin, base, *beneath), {"__module__": base.__module__})
    return _CLASSES[mixin, base]


def revive(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    cls = combined(mixin, base)
    return cls.__new__(cls)
