"""Adapted parameters that are matrices of no layer: stacks of experts, and others by name.

A *stack* is a parameter (experts, outputs, inputs), or (experts, inputs, outputs) where the module
says `is_transposed`. A parameter of two dimensions (outputs, inputs) is a stack of one: a router's
weight, or torch's `in_proj_weight`.

Each matrix of a stack is represented by a module, `<path of the parameter>.<number>`. For members,
merges, files and counts it is a linear layer. It is never called: `expert_forward.py` says how the
module that owns the parameter computes with the changed one.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.family.sharding import whole_shape
from lorakin.inject.attachments import Attachments, attachments_of

PREFIX = "lorakin_"
"""Prefix of the child module that holds a parameter's adapted matrices."""


class ExpertMatrix(nn.Module):
    """One matrix of a stack, as a module.

    In a stack of three dimensions `weight` is a view of the parameter, and setting it writes there.
    Where the parameter is the matrix, `weight` is the parameter, and setting it replaces that.

    >>> experts = nn.Module()
    >>> experts.num_experts, experts.down = 4, nn.Parameter(torch.zeros(4, 2, 3))
    >>> stack_names(experts), ExpertMatrix(experts, "down", 1).weight.shape
    (['down'], torch.Size([2, 3]))
    """

    bias = None
    owner: nn.Module
    stack: str
    number: int

    def __init__(self, owner: nn.Module, stack: str, number: int) -> None:
        super().__init__()
        # Not by `self.owner = owner`: the owner must not become a child of its own child.
        vars(self).update(owner=owner, stack=stack, number=number, training=owner.training)

    @property
    def weight(self) -> Tensor:
        """The matrix, (outputs, inputs)."""
        matrix = matrix_at(self.parameter, self.number)
        return matrix.T if self.is_transposed else matrix

    @property
    def shape(self) -> torch.Size:
        """(outputs, inputs), also where this process holds only a part of the parameter."""
        shape = whole_shape(self.parameter)[-2:]
        return torch.Size(reversed(shape)) if self.is_transposed else torch.Size(shape)

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter holds the matrix as (inputs, outputs)."""
        return is_stack_transposed(self.owner, self.stack)

    @property
    def parameter(self) -> nn.Parameter:
        """The stack's parameter."""
        parameter = self.owner._parameters[self.stack]
        assert parameter is not None
        return parameter

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        if len(whole_shape(self.parameter)) != 3:
            self.owner._parameters[self.stack] = value
            return
        with torch.no_grad():
            self.weight.copy_(value)


class ExpertStack(nn.Module):
    """The adapted matrices of one parameter: children by number, beside the parameter itself."""

    owner: nn.Module
    name: str

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        # The owner must not become a child of this, as in `ExpertMatrix`.
        vars(self).update(owner=owner, name=name)
        self.kept: Any = None
        """What `expert_forward.weight_for_forward` keeps between calls."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    @property
    def parameter(self) -> nn.Parameter:
        """The owner's present parameter."""
        parameter = self.owner._parameters[self.name]
        assert parameter is not None
        return parameter

    @property
    def is_transposed(self) -> bool:
        """Whether the matrices are held as (inputs, outputs)."""
        return is_stack_transposed(self.owner, self.name)

    def attached(self) -> dict[int, Attachments]:
        """Returns the attachments of each adapted matrix, by number."""
        matrices = self._modules.items()
        return {int(number): attachments_of(m) for number, m in matrices if m is not None}

    def base_parameter(self) -> Tensor:
        """Returns the parameter with the base's values, also while adapters are merged into it."""
        base_weights = {
            number: kept["weight"]
            for number, attached in self.attached().items()
            if (kept := {**attached.base_before_merge, **attached.base_before_move})
        }
        if not base_weights:
            return self.parameter
        base = self.parameter.detach().clone()
        for number, weight in base_weights.items():
            matrix_at(base, number).copy_(weight.T if self.is_transposed else weight)
        return base


def matrix_at(parameter: Tensor, number: int) -> Tensor:
    """Returns one matrix of a stack, in the stack's layout."""
    return parameter[number] if parameter.dim() == 3 else parameter


def matrix_count(parameter: Tensor) -> int:
    """Returns how many matrices a stack has.

    >>> matrix_count(torch.zeros(8, 4, 2)), matrix_count(torch.zeros(4, 2))
    (8, 1)
    """
    shape = whole_shape(parameter)
    return shape[0] if len(shape) == 3 else 1


def are_experts(module: nn.Module) -> bool:
    """Returns whether the module's stacks are those of experts, which have a `num_experts`."""
    return getattr(module, "num_experts", None) is not None and not isinstance(module, nn.Linear)


def is_stack_transposed(module: nn.Module, stack: str) -> bool:
    """Returns whether the matrices of this parameter are held as (inputs, outputs)."""
    parameter = module._parameters[stack]
    return parameter is not None and len(whole_shape(parameter)) == 3 and is_transposed(module)


def is_transposed(experts: nn.Module) -> bool:
    """Returns whether the module's stacks are (experts, inputs, outputs).

    transformers says it in `is_transposed`. Else the shapes of a gated MLP's two stacks tell.
    """
    declared = declared_transposed(experts)
    if declared is not None:
        return declared
    up, down = (experts._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None or len(whole_shape(up)) != 3 or len(whole_shape(down)) != 3:
        return False
    (_, hidden, twice), (_, inner, out) = whole_shape(up), whole_shape(down)
    return (hidden, twice) == (out, 2 * inner)


def declared_transposed(experts: nn.Module) -> bool | None:
    """Returns the module's `is_transposed`, which PEFT reads; None if it has none."""
    declared = getattr(experts, "is_transposed", None)
    return None if declared is None else bool(declared)


def stacks(experts: nn.Module) -> list[ExpertStack]:
    """Returns the module's stacks in which a matrix is adapted."""
    return [child for child in experts._modules.values() if isinstance(child, ExpertStack)]


def stack_names(module: nn.Module) -> list[str]:
    """Returns the names of the parameters of `module` that are stacks of experts, in its order."""
    if not are_experts(module):
        return []
    experts: Any = module.num_experts
    shapes = {name: whole_shape(p) for name, p in module._parameters.items() if p is not None}
    stacked = {name: shape for name, shape in shapes.items() if shape and shape[0] == experts}
    return [
        name
        for name, shape in stacked.items()
        if len(shape) == 3 or (len(shape) == 2 and name == "weight")
    ]


def matrices(experts: nn.Module, stack: str) -> list[nn.Module]:
    """Returns all matrices of a stack in order, the modules of adapted ones included."""
    adapted, parameter = experts._modules.get(PREFIX + stack), experts._parameters[stack]
    assert parameter is not None
    modules = adapted._modules if isinstance(adapted, ExpertStack) else {}
    numbers = range(matrix_count(parameter))
    return [modules.get(str(n)) or ExpertMatrix(experts, stack, n) for n in numbers]


def find_matrix(experts: nn.Module, stack: str, number: str) -> ExpertMatrix | None:
    """Returns the matrix with this number (in decimals); None if there is none."""
    adapted = experts._modules.get(PREFIX + stack)
    if isinstance(adapted, ExpertStack) and number in adapted._modules:
        return adapted._modules[number]  # type: ignore[return-value]
    parameter = experts._parameters.get(stack)
    if parameter is None or len(whole_shape(parameter)) not in (2, 3):
        return None
    if not re.fullmatch("0|[1-9][0-9]*", number) or int(number) >= matrix_count(parameter):
        return None
    return ExpertMatrix(experts, stack, int(number))


def base_stack(module: nn.Module, name: str) -> Tensor | None:
    """Returns a parameter with the base's values; None if no matrix of it is adapted."""
    stack = module._modules.get(PREFIX + name)
    return stack.base_parameter() if isinstance(stack, ExpertStack) else None


def kept_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """Returns the module's weight, to be kept while other values take its place.

    It is a copy for a matrix of a stack, where the values will be overwritten.
    """
    in_stack = isinstance(module, ExpertMatrix) and len(whole_shape(module.parameter)) == 3
    return weight.detach().clone() if in_stack else weight
