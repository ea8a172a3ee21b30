"""Modules that an adapter trains whole: a classifier's new head, say."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorakin.errors import TargetError
from lorakin.inject import layer_kinds, quantised
from lorakin.inject.near_names import near
from lorakin.inject.patterns import is_inside
from lorakin.inject.targets import named_modules


def find_whole_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns the paths of the modules to train whole, selected by path or last parts of it.

    Raises:
        TargetError: no module has that name, or one that has it cannot be trained whole.

    >>> find_whole_modules(nn.ModuleDict({"score": nn.Linear(2, 2), "act": nn.ReLU()}), ["score"])
    ['score']
    """
    modules = {path: m for path, m in named_modules(model).items() if path}
    selected: dict[str, None] = {}
    for name in names:
        paths = [p for p in modules if p == name or p.endswith("." + name)]
        if not paths:
            raise TargetError(f"modules_to_save: {name!r} matches no module; {near(name, modules)}")
        if not any(True for p in paths for _ in modules[p].parameters()):
            raise TargetError(f"modules_to_save: {name!r} has no parameters to train")
        for path in paths:
            if reason := _refusal(modules[path]):
                raise TargetError(
                    f"modules_to_save: {path} cannot be trained whole: it is {reason}"
                )
        selected |= dict.fromkeys(paths)
    return [
        path
        for path in modules
        if path in selected and not is_inside(path, [p for p in selected if p != path])
    ]


def _refusal(module: nn.Module) -> str | None:
    """Returns why a module cannot be trained whole; None if it can."""
    if layer_kinds.is_container(module):
        return f"a {type(module).__name__}, which is never called itself; name the modules in it"
    if any(quantised.is_quantised(part) for part in module.modules()):
        return (
            "quantised. Adapt it, or load the model with it left out (bitsandbytes: "
            "llm_int8_skip_modules; torchao: modules_to_not_convert)"
        )
    return None
