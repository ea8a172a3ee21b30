"""lorakin: the LoRA family of fine-tuning methods, on your model, in place.

The names of `lorakin.public` are loaded on first use (PEP 562), so that `lorakin --help` does not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # the site's reader of source code does not follow the `__all__ +=` of public.py
    from lorakin.family.members import *  # noqa: F403
    from lorakin.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("lorakin.public")
    try:
        return vars(public)[name] if name in (*public.__all__, "__all__") else globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("lorakin.public").__all__})
