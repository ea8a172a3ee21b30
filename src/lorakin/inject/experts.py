"""Parameters that are matrices though no layer holds them: experts in one of three dimensions, and others that are named.

A parameter (experts, outputs, inputs), or (experts, inputs, outputs) where the module says `is_transposed`, is a *stack*, and
so is one of two dimensions (outputs, inputs), of one: a router's weight, or torch's `in_proj_weight`. Each matrix of a stack is
seen as a module of its own, `<path of the parameter>.<number>`, which members, merges, files and counts take for a linear
layer. None of these is ever called: with adapters on them the module that owns the parameter runs its own forward on a twin of
itself whose stacks are `implicit.Changed`. Who else reads the parameter in a forward gets the changed one too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.errors import LorakinWarning
from lorakin.family import Pair
from lorakin.family.low_rank import padded
from lorakin.family.pair import whole_shape
from lorakin.inject.attachments import attachments_of
from lorakin.inject.callers import is_in_forward
from lorakin.inject.class_swap import Swapped, base_class, combined, swap_class, unmix
from lorakin.kernels.autograd import Copied, Version
from lorakin.kernels.factored_weight import Change, Changed, formed, read

PREFIX = "lorakin_"
"""Before the name of a stack's module, which hangs beside the parameter: two of one name are more than torch can bear."""
ALIGNED = 8
"""Ranks are padded to a multiple of this: kernels take rows of 16 bytes or several times that."""


class ExpertMatrix(nn.Module):
    """One matrix of a stack. Its `weight` (outputs, inputs) is a view of the parameter; other values are written there.

    Where the parameter is the matrix, it is the weight itself, and another takes its place.
    """

    bias = None
    experts: nn.Module
    stack: str
    number: int

    def __init__(self, experts: nn.Module, stack: str, number: int) -> None:
        super().__init__()
        own = {"experts": experts, "stack": stack, "number": number, "training": experts.training}
        vars(self).update(
            own
        )  # so that the experts are no child of this: it is the other way round

    @property
    def weight(self) -> Tensor:
        """Its own, (outputs, inputs)."""
        matrix = _part(self.parameter, self.number)
        return matrix.T if self.is_turned else matrix

    @property
    def shape(self) -> torch.Size:
        """(outputs, inputs), also of a parameter of which this process holds a part."""
        shape = whole_shape(self.parameter)[-2:]
        return torch.Size(reversed(shape)) if self.is_turned else torch.Size(shape)

    @property
    def is_turned(self) -> bool:
        """Whether the parameter has it as (inputs, outputs)."""
        return is_turned(self.experts, self.stack)

    @property
    def parameter(self) -> nn.Parameter:
        """That of the stack."""
        parameter = self.experts._parameters[self.stack]
        assert parameter is not None
        return parameter

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        if len(whole_shape(self.parameter)) != 3:
            self.experts._parameters[self.stack] = value
            return
        with torch.no_grad():
            self.weight.copy_(value)


def _attachments(matrix: nn.Module | None) -> Any:
    assert matrix is not None
    return attachments_of(matrix)


def _own_weight(matrix: Any) -> Tensor:
    """The base's own (outputs, inputs), even while adapters are merged."""
    weight: Tensor = _attachments(matrix).base.get("weight", matrix.weight)
    return weight.detach()


def count(parameter: Tensor) -> int:
    """How many matrices a stack has."""
    shape = whole_shape(parameter)
    return shape[0] if len(shape) == 3 else 1


def _part(parameter: Tensor, number: int) -> Tensor:
    return parameter[number] if parameter.dim() == 3 else parameter


class ExpertStack(nn.Module):
    """Those matrices of one parameter that are adapted, by number, as children of the module that owns it."""

    experts: nn.Module
    name: str

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        vars(self).update(experts=experts, name=name)
        self._ready: tuple[Version, Copied, Changed, list[float]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    @property
    def parameter(self) -> nn.Parameter:
        """The one that the experts have at the moment."""
        parameter = self.experts._parameters[self.name]
        assert parameter is not None
        return parameter

    def own(self) -> Tensor:
        """The parameter with the base's own values, also where adapters are merged or have moved it."""
        aside = {
            int(n): there
            for n, m in self._modules.items()
            if (there := {**_attachments(m).base, **_attachments(m).unmoved})
        }
        if not aside:
            return self.parameter
        own = self.parameter.detach().clone()
        for number, there in aside.items():
            _part(own, number).copy_(
                there["weight"].T if is_turned(self.experts, self.name) else there["weight"]
            )
        return own

    def changed(self) -> Tensor | None:
        """The parameter with what the adapters in use make of it; None if there are none."""
        branches = self._branches()
        if not branches:
            return None
        weight, by_columns = self.parameter, not is_turned(self.experts, self.name)
        if torch.compiler.is_compiling():
            return formed(
                weight,
                tuple(self._change(weight, of_one) for of_one in branches.values()),
                by_columns,
            )
        one_of_each = [next(iter(of_one.values())) for of_one in branches.values()]
        drops = any(branch.training and branch.method.dropout for branch in one_of_each)
        there = [
            weight,
            *(
                p
                for of_one in branches.values()
                for branch in of_one.values()
                for p in branch._parameters.values()
            ),
        ]
        lasts = (
            not torch.is_grad_enabled()
            and not drops
            and not any(p.requires_grad for p in there[1:])
        )
        scales = [branch.scale for branch in one_of_each]
        known = self._ready if lasts else None
        if (
            known is not None
            and known[3] == scales
            and known[0].is_still(weight)
            and known[1].is_still(*there[1:])
        ):
            return known[2]
        changed = Changed(
            weight, tuple(self._change(weight, of_one) for of_one in branches.values()), by_columns
        )
        seen, copied = (Version.of(weight), Copied.of(*there[1:])) if lasts else (None, None)
        self._ready = None if seen is None or copied is None else (seen, copied, changed, scales)
        return changed

    def read(self) -> Tensor | None:
        """The same for who may take it where torch cannot look."""
        if not (branches := self._branches()):
            return None
        weight, by_columns = self.parameter, not is_turned(self.experts, self.name)

        def make() -> tuple[Change, ...]:
            with torch.autocast(weight.device.type, enabled=False):
                return tuple(self._change(weight, of_one) for of_one in branches.values())

        tensors = [
            p
            for of_one in branches.values()
            for branch in of_one.values()
            for p in branch._parameters.values()
        ]
        return read(weight, make, by_columns, tensors)

    def _branches(self) -> dict[str, dict[int, Any]]:
        """The branches of the adapters in use, by adapter and number. None of them is in a mixed batch."""
        branches: dict[str, dict[int, Any]] = {}
        for number, matrix in self._modules.items():
            attached = _attachments(matrix)
            for name in attached.names_in_use() if attached.rows is None else ():
                branches.setdefault(name, {})[int(number)] = attached[name]
        return branches

    def _change(self, weight: Tensor, branches: Mapping[int, Any]) -> Change:
        """What one adapter does, its pairs side by side and, where a matrix has none, zeros for one."""
        some = next(iter(branches.values()))
        of_gain = some.method.gains  # for which alone the weight counts
        own = {
            number: _own_weight(self._modules[str(number)]) if of_gain else weight
            for number in branches
        }
        pairs = {
            number: branch.factors(branch.wide(), own[number])
            for number, branch in branches.items()
        }
        none = (
            Pair(weight.new_zeros(some.shape.outputs, 0), weight.new_zeros(0, some.shape.inputs)),
            0.0,
        )
        up, down, gain = side_by_side([pairs.get(number, none) for number in range(count(weight))])
        up, down = up.to(weight.dtype), down.to(weight.dtype)
        is_own = gain is None or not any(
            _attachments(self._modules[str(number)]).base for number in branches
        )
        left, right = (down.mT, up.mT) if is_turned(self.experts, self.name) else (up, down)
        dropout = some.method.dropout if some.training else 0.0
        if dropout and not are_experts(self.experts):
            warnings.warn(
                f"the dropout of the adapter does not act in {some.path}: it is a parameter of a "
                f"{base_class(self.experts).__name__}, and dropout is for the inputs of a layer",
                LorakinWarning,
                stacklevel=3,
            )
            dropout = 0.0
        if weight.dim() == 3:
            return Change(left, right, gain, None if is_own else self.own(), dropout)
        return Change(
            left[0],
            right[0],
            None if gain is None else gain[0],
            None if is_own else self.own(),
            dropout,
        )


def side_by_side(factors: Sequence[tuple[Pair, float]]) -> Pair:
    """Pairs and their scales as one pair of three dimensions: up (n, outputs, r), down (n, r, inputs), gain (n, outputs)."""
    ranks, scales = [pair.down.shape[0] for pair, _ in factors], {scale for _, scale in factors}
    most = max(ranks)
    pairs = [pair if pair.down.shape[0] == most else padded(pair, most) for pair, _ in factors]
    up, down = torch.stack([pair.up for pair in pairs]), torch.stack([pair.down for pair in pairs])
    if len(scales) == 1:
        up = up * scales.pop()
    else:
        up = up * torch.tensor(
            [scale for _, scale in factors], dtype=up.dtype, device=up.device
        ).view(-1, 1, 1)
    if more := -most % ALIGNED if most else ALIGNED:
        up, down = F.pad(up, (0, more)), F.pad(down, (0, 0, 0, more))
    gains = [pair.gain for pair in pairs]
    if all(gain is None for gain in gains):
        return Pair(up, down)
    return Pair(
        up,
        down,
        torch.stack([up.new_ones(up.shape[1]) if gain is None else gain for gain in gains]),
    )


class AdaptedExperts(Swapped):
    """Mixed in before the class of experts of which some matrices are adapted: its forward sees the changed stacks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        together = are_experts(self)
        changed = {
            stack.name: stack.changed() if together else stack.read() for stack in stacks(self)
        }
        weights = {name: weight for name, weight in changed.items() if weight is not None}
        if torch.compiler.is_compiling():  # which takes no module that is made in a forward
            vars(self).update(weights)
            out = super().forward(*args, **kwargs)
            for name in weights:
                del vars(self)[name]
            return out
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), **weights)  # where they are found before the parameters
        out = super(AdaptedExperts, twin).forward(*args, **kwargs)
        vars(self).update({key: value for key, value in vars(twin).items() if key not in weights})
        return out

    def __getattr__(self, name: str) -> Any:
        stack = vars(self).get("_modules", {}).get(PREFIX + name)
        if (
            isinstance(stack, ExpertStack)
            and is_in_forward(1)
            and (changed := stack.read()) is not None
        ):
            return changed
        return super().__getattr__(name)


def are_experts(module: nn.Module) -> bool:
    """Whether the module's stacks are those of experts, all of which are meant by many patterns."""
    return getattr(module, "num_experts", None) is not None and not isinstance(module, nn.Linear)


def is_turned(module: nn.Module, stack: str) -> bool:
    """Whether the matrices of this parameter are held as (inputs, outputs)."""
    parameter = module._parameters[stack]
    return parameter is not None and len(whole_shape(parameter)) == 3 and is_transposed(module)


def is_transposed(experts: nn.Module) -> bool:
    """Whether its stacks are (experts, inputs, outputs): as transformers says it, else by how the two of a gated MLP fit."""
    said = says_transposed(experts)
    if said is not None:
        return said
    up, down = (experts._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None or len(whole_shape(up)) != 3 or len(whole_shape(down)) != 3:
        return False
    (_, hidden, twice), (_, inner, out) = whole_shape(up), whole_shape(down)
    return (hidden, twice) == (out, 2 * inner)


def says_transposed(experts: nn.Module) -> bool | None:
    """What transformers says of a module's stacks, which is what PEFT goes by; None if nothing."""
    return None if (said := getattr(experts, "is_transposed", None)) is None else bool(said)


def stacks(experts: nn.Module) -> list[ExpertStack]:
    """Those of its stacks in which something is adapted."""
    return [child for child in experts._modules.values() if isinstance(child, ExpertStack)]


def stack_names(module: nn.Module) -> list[str]:
    """The parameters of `module` that are stacks, in its order."""
    if not are_experts(module):
        return []
    experts: Any = module.num_experts
    shapes = {name: whole_shape(p) for name, p in module._parameters.items() if p is not None}
    held = {name: len(shape) for name, shape in shapes.items() if shape and shape[0] == experts}
    return [
        name
        for name, dimensions in held.items()
        if dimensions == 3 or (dimensions == 2 and name == "weight")
    ]


def matrices(experts: nn.Module, stack: str) -> list[nn.Module]:
    """All of a stack in order, an adapted one as it hangs there."""
    adapted, parameter = experts._modules.get(PREFIX + stack), experts._parameters[stack]
    assert parameter is not None
    hanging = adapted._modules if isinstance(adapted, ExpertStack) else {}
    return [hanging.get(str(n)) or ExpertMatrix(experts, stack, n) for n in range(count(parameter))]


def matrix_of(experts: nn.Module, stack: str, number: str) -> ExpertMatrix | None:
    """The matrix of this number in decimals, the one that is adapted if it is; None if there is none."""
    adapted = experts._modules.get(PREFIX + stack)
    if isinstance(adapted, ExpertStack) and number in adapted._modules:
        return adapted._modules[number]  # type: ignore[return-value]
    parameter = experts._parameters.get(stack)
    if (
        parameter is None
        or len(whole_shape(parameter)) not in (2, 3)
        or not re.fullmatch("0|[1-9][0-9]*", number)
    ):
        return None
    return ExpertMatrix(experts, stack, int(number)) if int(number) < count(parameter) else None


def attach(matrix: ExpertMatrix) -> None:
    """Let the experts' module know of a matrix on which an adapter hangs."""
    experts = matrix.experts
    if not isinstance(experts, AdaptedExperts):
        swap_class(experts, combined(AdaptedExperts, type(experts)))
    stack = experts._modules.setdefault(PREFIX + matrix.stack, ExpertStack(experts, matrix.stack))
    assert stack is not None
    stack._modules[str(matrix.number)] = matrix


def detach(matrix: ExpertMatrix) -> None:
    """Undo `attach`."""
    experts = matrix.experts
    stack = experts._modules[PREFIX + matrix.stack]
    assert stack is not None
    del stack._modules[str(matrix.number)]
    if not stack._modules:
        del experts._modules[PREFIX + matrix.stack]
    if not stacks(experts):
        unmix(experts, AdaptedExperts)


def own_stack(module: nn.Module, name: str) -> Tensor | None:
    """The parameter of this name with the base's own values, if it is a stack in which something is adapted."""
    stack = module._modules.get(PREFIX + name)
    return stack.own() if isinstance(stack, ExpertStack) else None


def set_aside(module: nn.Module, weight: Tensor) -> Tensor:
    """What to keep of a module's weight when other values take its place; those of experts are written over it."""
    in_stack = isinstance(module, ExpertMatrix) and len(whole_shape(module.parameter)) == 3
    return weight.detach().clone() if in_stack else weight
