"""Changes the class of one module, and gives it back: how all of lorakin is mixed into a model."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from lorakin.errors import StateError


class Swapped(nn.Module):
    """Base of all classes that are mixed in before a module's own class.

    The combined class is made at run time. So a pickle or copy names the mixin and the own class.
    """

    @staticmethod
    def mixins_after(base: type[nn.Module]) -> tuple[type[nn.Module], ...]:
        """Returns what to mix in after a module's own class, where its `super()` finds it."""
        return ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return revive, (type(self).__bases__[0], base_class(self)), self.__dict__


def base_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that the module had before the latest mixin."""
    cls = type(module)
    if not isinstance(module, Swapped):
        return cls
    if cls not in _CLASSES.values():
        raise StateError(
            f"the class of an adapted {cls.__name__} was changed after it was adapted, for example "
            "by parametrizing or sharding it; undo that first"
        )
    return cls.__bases__[1]


def unmix(module: nn.Module, *mixins: type[nn.Module]) -> None:
    """Takes these mixins out of the module's class, whatever was mixed in after them.

    >>> class Loud(Swapped): ...
    >>> layer = nn.Linear(2, 2)
    >>> swap_class(layer, combined(Loud, nn.Linear))
    >>> unmix(layer, Loud)
    >>> type(layer) is nn.Linear
    True
    """

    def without(cls: type[nn.Module]) -> type[nn.Module]:
        mixin, base = cls.__bases__[:2]
        return base if mixin in mixins else combined(mixin, without(base))

    base_class(module)  # raises if the class is no longer one of ours
    swap_class(module, without(type(module)))


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the module's class, and where Accelerate has hooked the module its `forward` too.

    Accelerate's hooks shadow `forward` on the instance and call `_old_forward`, the forward of the
    class that the module had then.
    """
    module.__class__ = cls
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(cls.forward, module)


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def combined(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Returns the one subclass of `mixin` and `base`.

    >>> class Loud(Swapped): ...
    >>> combined(Loud, nn.Linear).__name__, combined(Loud, nn.Linear) is combined(Loud, nn.Linear)
    ('LoudLinear', True)
    """
    if (mixin, base) not in _CLASSES:
        name = f"{mixin.__name__}{base.__name__}"
        mixins_after = mixin.mixins_after(base) if issubclass(mixin, Swapped) else ()
        _CLASSES[mixin, base] = type(
            name, (mixin, base, *mixins_after), {"__module__": base.__module__}
        )
    return _CLASSES[mixin, base]


def revive(mixin: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """Makes an empty instance of a combined class, to unpickle or copy into."""
    cls = combined(mixin, base)
    return cls.__new__(cls)
