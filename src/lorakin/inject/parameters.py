"""Targets that name no layer: a parameter of a module, and torch's attention.

A pattern means a parameter only where no module has that name, so that patterns for layers do not
select one by accident. A layer's weight means the layer; other parameters of layers are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lorakin.errors import TargetError
from lorakin.family.sharding import whole_shape
from lorakin.inject import layer_kinds
from lorakin.inject.attachments import base_parameters
from lorakin.inject.experts import ExpertMatrix

IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Parameters of nn.MultiheadAttention.

It has the first, or the others where keys or values have sizes of their own.
"""

ATTENTION_PART = rf"(?:\.(?:(?:{'|'.join(IN_PROJECTIONS)})\.0|out_proj))?"
"""A pattern for what may follow an attention's path in the paths that its adapter is on."""


def parameters_by_path(model: nn.Module) -> dict[str, Tensor]:
    """Returns the base's parameters by path, except those of the model itself."""
    return {path: parameter for path, parameter in base_parameters(model) if "." in path}


def adaptable_parameters(module: nn.Module) -> list[str]:
    """Returns the parameters of `module` that can be adapted by name.

    >>> attention = nn.MultiheadAttention(4, 2)
    >>> adaptable_parameters(attention), adaptable_parameters(nn.Linear(2, 2))
    (['in_proj_weight'], [])
    """
    if layer_kinds.kind_of(module) is not None:
        return []
    return [
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and _dimensions(parameter) in (2, 3)
    ]


def _dimensions(parameter: Tensor) -> int:
    """Returns how many dimensions a parameter has; 0 if it gets them in the first forward."""
    return 0 if isinstance(parameter, UninitializedParameter) else len(whole_shape(parameter))


def is_attention(module: nn.Module) -> bool:
    """Returns whether it is torch's attention, which multiplies by its own parameters."""
    return isinstance(module, nn.MultiheadAttention)


def parts_of_attention(path: str, module: nn.Module) -> list[str]:
    """Returns the paths that an attention's adapter is on: its in-projections and `out_proj`.

    >>> parts_of_attention("attn", nn.MultiheadAttention(4, 2))
    ['attn.in_proj_weight', 'attn.out_proj']
    """
    present = [name for name in IN_PROJECTIONS if module._parameters.get(name) is not None]
    return [f"{path}.{name}" for name in (*present, "out_proj")]


def resolve_parameters(model: nn.Module, pattern: str, selected: Iterable[str]) -> list[str]:
    """Returns the paths to adapt for the parameters that `pattern` selects.

    That is the layer if the parameter is its weight, else the parameter.

    Raises:
        TargetError: one of them is neither a matrix nor a stack of matrices.
    """
    by_path, resolved = parameters_by_path(model), []
    for selected_path in selected:
        # A selected path that is not a parameter's is that of one matrix of a stack.
        is_parameter = selected_path in by_path
        path = selected_path if is_parameter else selected_path.rpartition(".")[0]
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        kind = layer_kinds.kind_of(module)
        if kind is not None and not isinstance(module, ExpertMatrix) and name == "weight":
            resolved.append(owner)
            continue
        if kind is not None:
            raise TargetError(
                f"target {pattern!r} selects {path}, a parameter that a {type(module).__name__} "
                "has beside its weight; only the weight of a layer is adapted"
            )
        dimensions = _dimensions(by_path[path])
        if dimensions not in (2, 3):
            raise TargetError(
                f"target {pattern!r} selects {path}, a parameter of {dimensions} dimensions; an "
                "adapter needs 2, a matrix, or 3, a stack of matrices"
            )
        resolved.append(selected_path)
    return resolved


def attention_of(parameter: str) -> str:
    """Returns the path of the attention that an in-projection belongs to; "" for another parameter.

    >>> attention_of("encoder.attn.in_proj_weight"), attention_of("encoder.fc.weight")
    ('encoder.attn', '')
    """
    owner, _, name = parameter.rpartition(".")
    return owner if name in IN_PROJECTIONS else ""


def attention_parts(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns what an adapter of the attentions among `paths` is on."""
    attentions = [path for path in paths if path in modules and is_attention(modules[path])]
    return [part for path in attentions for part in parts_of_attention(path, modules[path])]
