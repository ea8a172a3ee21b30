"""Targets that name no layer: a parameter of a module, and torch's attention, which is made of such.

A pattern means a parameter only where no module has that name, so that no pattern for layers takes
one by the way. The weight of a layer is the layer; other parameters of layers are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lorakin.errors import TargetError
from lorakin.family.pair import whole_shape
from lorakin.inject import layers
from lorakin.inject.attachments import base_parameters
from lorakin.inject.experts import ExpertMatrix

IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Of nn.MultiheadAttention: the first, or the three others where keys or values have sizes of their own."""

PART = rf"(?:\.(?:(?:{'|'.join(IN_PROJECTIONS)})\.0|out_proj))?"
"""What may follow the path of an attention in the paths of what an adapter of it is on; a regular expression."""


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters by path, but those of the model itself and those of stacks of experts."""
    return {path: parameter for path, parameter in base_parameters(model) if "." in path}


def names(module: nn.Module) -> list[str]:
    """The parameters of `module` that can be adapted where they are named."""
    if layers.kind_of(module) is not None:
        return []
    held = {
        name: parameter for name, parameter in module._parameters.items() if parameter is not None
    }
    return [name for name, parameter in held.items() if _dimensions(parameter) in (2, 3)]


def _dimensions(parameter: Tensor) -> int:
    """How many it has; 0 if it gets them in the first forward."""
    return 0 if isinstance(parameter, UninitializedParameter) else len(whole_shape(parameter))


def is_attention(module: nn.Module) -> bool:
    """Whether it is torch's attention, which multiplies by its own parameters and by `out_proj.weight`."""
    return isinstance(module, nn.MultiheadAttention)


def of_attention(path: str, module: nn.Module) -> list[str]:
    """The parameters and the layer that an adapter of such a module is on: what the module multiplies by."""
    held = [f"{path}.{name}" for name in IN_PROJECTIONS if module._parameters.get(name) is not None]
    return [*held, f"{path}.out_proj"]


def meant(model: nn.Module, pattern: str, selected: Iterable[str]) -> list[str]:
    """Those of the parameters `selected` by a pattern as what an adapter is on: the layer, or the parameter.

    Raises:
        TargetError: one that is no matrix and no stack of them.
    """
    held, found = parameters(model), []
    for whole in selected:
        path = whole if whole in held else whole.rpartition(".")[0]  # one matrix of a stack
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        kind = layers.kind_of(module)
        if kind is not None and not isinstance(module, ExpertMatrix) and name == "weight":
            found.append(owner)
            continue
        if kind is not None:
            beside = f"a parameter that a {type(module).__name__} has beside its weight"
            raise TargetError(
                f"target {pattern!r} selects {path}, {beside}; only the weight of a layer is adapted"
            )
        dimensions = _dimensions(held[path])
        if dimensions not in (2, 3):
            raise TargetError(
                f"target {pattern!r} selects {path}, a parameter of {dimensions} dimensions; an adapter needs 2, a matrix, "
                "or 3, a stack of matrices"
            )
        found.append(whole)
    return found


def attention_of(parameter: str) -> str:
    """The path of the attention to which an in-projection at this path belongs; empty for another parameter."""
    owner, _, name = parameter.rpartition(".")
    return owner if name in IN_PROJECTIONS else ""


def parts_of(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """What an adapter of the attentions among `paths` is on."""
    attentions = [path for path in paths if path in modules and is_attention(modules[path])]
    return [part for path in attentions for part in of_attention(path, modules[path])]
