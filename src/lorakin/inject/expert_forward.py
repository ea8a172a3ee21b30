"""How a module computes with adapted stacks: it runs its own forward on changed parameters.

The forward runs on a twin of the module whose stacks are `Changed` (kernels/factored_weight.py), so
its products with them become products with the base's weight and the adapters' factors. Another
forward that reads such a parameter gets the changed one too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.errors import LorakinWarning
from lorakin.family import Pair
from lorakin.family.low_rank import padded
from lorakin.family.pair import ScaledPair
from lorakin.inject.callers import is_in_forward
from lorakin.inject.class_swap import Swapped, base_class, combined, swap_class, unmix
from lorakin.inject.experts import PREFIX, ExpertMatrix, ExpertStack, are_experts, count, stacks
from lorakin.kernels.autograd import Copied, Version
from lorakin.kernels.factored_weight import Change, Changed, formed, read

ALIGNED = 8
"""Ranks are padded to a multiple of this: grouped kernels need rows of a multiple of 16 bytes."""

Branches = Mapping[str, Mapping[int, Any]]
"""The branches of the adapters in use on a stack, by adapter and by number of the matrix."""


class AdaptedExperts(Swapped):
    """Mixed in before the class of a module that owns an adapted stack."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        change = changed if are_experts(self) else readable
        found = {stack.name: change(stack) for stack in stacks(self)}
        weights = {name: weight for name, weight in found.items() if weight is not None}
        if torch.compiler.is_compiling():  # it cannot trace a module that is made in a forward
            vars(self).update(weights)
            out = super().forward(*args, **kwargs)
            for name in weights:
                del vars(self)[name]
            return out

        twin = object.__new__(type(self))
        vars(twin).update(vars(self), **weights)  # attributes are found before parameters
        out = super(AdaptedExperts, twin).forward(*args, **kwargs)
        vars(self).update({key: value for key, value in vars(twin).items() if key not in weights})
        return out

    def __getattr__(self, name: str) -> Any:
        stack = vars(self).get("_modules", {}).get(PREFIX + name)
        if not isinstance(stack, ExpertStack) or not is_in_forward(1):
            return super().__getattr__(name)
        weight = readable(stack)
        return super().__getattr__(name) if weight is None else weight


def attach(matrix: ExpertMatrix) -> None:
    """Hangs an adapted matrix beside its parameter, and lets the owner's forward see its change."""
    experts = matrix.experts
    if not isinstance(experts, AdaptedExperts):
        swap_class(experts, combined(AdaptedExperts, type(experts)))
    stack = experts._modules.setdefault(PREFIX + matrix.stack, ExpertStack(experts, matrix.stack))
    assert stack is not None
    stack._modules[str(matrix.number)] = matrix


def detach(matrix: ExpertMatrix) -> None:
    """Undoes `attach`."""
    experts = matrix.experts
    stack = experts._modules[PREFIX + matrix.stack]
    assert stack is not None
    del stack._modules[str(matrix.number)]
    if not stack._modules:
        del experts._modules[PREFIX + matrix.stack]
    if not stacks(experts):
        unmix(experts, AdaptedExperts)


def changed(stack: ExpertStack) -> Tensor | None:
    """Returns a stack of experts with the changes of the adapters in use; None if there are none.

    While nothing trains and no gradient is wanted, the same `Changed` is returned again as long as
    the weight, the adapters' numbers and their scales stay the same.
    """
    branches = _branches(stack)
    if not branches:
        return None
    weight, by_columns = stack.parameter, not stack.is_turned
    if torch.compiler.is_compiling():
        return formed(weight, _changes(stack, weight, branches), by_columns)

    first_of_each = [next(iter(of_one.values())) for of_one in branches.values()]
    scales = [branch.scale for branch in first_of_each]
    own = _tensors(branches)
    drops = any(branch.training and branch.method.dropout for branch in first_of_each)
    trains = any(tensor.requires_grad for tensor in own)
    if drops or trains or torch.is_grad_enabled():
        stack.ready = None
        return Changed(weight, _changes(stack, weight, branches), by_columns)

    if stack.ready is not None:
        seen, copied, ready, its_scales = stack.ready
        if its_scales == scales and seen.is_still(weight) and copied.is_still(*own):
            return ready  # type: ignore[no-any-return]
    ready = Changed(weight, _changes(stack, weight, branches), by_columns)
    seen, copied = Version.of(weight), Copied.of(*own)
    stack.ready = None if seen is None or copied is None else (seen, copied, ready, scales)
    return ready


def readable(stack: ExpertStack) -> Tensor | None:
    """Returns the same as `changed`, for code that torch cannot look into."""
    if not (branches := _branches(stack)):
        return None
    weight = stack.parameter

    def make() -> tuple[Change, ...]:
        with torch.autocast(weight.device.type, enabled=False):
            return _changes(stack, weight, branches)

    return read(weight, make, not stack.is_turned, _tensors(branches))


def _branches(stack: ExpertStack) -> Branches:
    """Returns the branches in use, except those in a mixed batch, which stacks cannot be in."""
    found: dict[str, dict[int, Any]] = {}
    for number, attached in stack.attached().items():
        for name in attached.names_in_use() if attached.mixed_batch is None else ():
            found.setdefault(name, {})[number] = attached[name]
    return found


def _tensors(branches: Branches) -> list[Tensor]:
    """Returns the tensors of these branches."""
    every = (branch for of_one in branches.values() for branch in of_one.values())
    return [parameter for branch in every for parameter in branch._parameters.values()]


def _changes(stack: ExpertStack, weight: Tensor, branches: Branches) -> tuple[Change, ...]:
    return tuple(_change(stack, weight, of_one) for of_one in branches.values())


def _change(stack: ExpertStack, weight: Tensor, branches: Mapping[int, Any]) -> Change:
    """Returns one adapter's change of the stack: its pairs side by side.

    A matrix that it does not adapt has a pair of zeros.
    """
    first, attached = next(iter(branches.values())), stack.attached()

    def base_weight_of(number: int) -> Tensor:
        if not first.method.has_gain:  # only a gain depends on the numbers of the weight
            return weight
        matrix: Any = stack._modules[str(number)]
        own: Tensor = attached[number].base.get("weight", matrix.weight)
        return own.detach()

    pairs = {
        n: branch.scaled_pair(branch.wide(), base_weight_of(n)) for n, branch in branches.items()
    }
    outputs, inputs = first.shape[:2]
    none = ScaledPair(Pair(weight.new_zeros(outputs, 0), weight.new_zeros(0, inputs)), 0.0)
    up, down, gain = side_by_side([pairs.get(n, none) for n in range(count(weight))])
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    left, right = (down.mT, up.mT) if stack.is_turned else (up, down)

    is_merged = any(attached[number].base for number in branches)
    own = stack.own() if gain is not None and is_merged else None
    dropout = _dropout(stack, first)
    if weight.dim() == 3:
        return Change(left, right, gain, own, dropout)
    return Change(left[0], right[0], None if gain is None else gain[0], own, dropout)


def _dropout(stack: ExpertStack, branch: Any) -> float:
    """Returns the dropout of a branch now; 0, with a warning, where there are no inputs to drop."""
    dropout: float = branch.method.dropout if branch.training else 0.0
    if not dropout or are_experts(stack.experts):
        return dropout
    warnings.warn(
        f"the dropout of the adapter does not act in {branch.path}: it is a parameter of a "
        f"{base_class(stack.experts).__name__}, and dropout is for the inputs of a layer",
        LorakinWarning,
        stacklevel=3,
    )
    return 0.0


def side_by_side(scaled: Sequence[ScaledPair]) -> Pair:
    """Stacks n pairs into one pair of three dimensions, with the scales in `up`.

    Pairs of smaller rank are padded with zeros, all to a multiple of `ALIGNED`: `up` (n, outputs,
    r), `down` (n, r, inputs), `gain` (n, outputs) or None.

    >>> pairs = [ScaledPair(Pair(torch.ones(3, r), torch.ones(r, 2))) for r in (1, 2)]
    >>> [tuple(t.shape) for t in side_by_side(pairs)[:2]]
    [(2, 3, 8), (2, 8, 2)]
    """
    scales = {scale for _, scale in scaled}
    most = max(pair.down.shape[0] for pair, _ in scaled)
    pairs = [pair if pair.down.shape[0] == most else padded(pair, most) for pair, _ in scaled]
    up, down = torch.stack([pair.up for pair in pairs]), torch.stack([pair.down for pair in pairs])
    if len(scales) == 1:
        up = up * scales.pop()
    else:
        each = torch.tensor([scale for _, scale in scaled], dtype=up.dtype, device=up.device)
        up = up * each.view(-1, 1, 1)
    if more := -most % ALIGNED if most else ALIGNED:
        up, down = F.pad(up, (0, more)), F.pad(down, (0, 0, 0, more))

    if all(pair.gain is None for pair in pairs):
        return Pair(up, down)
    ones = up.new_ones(up.shape[1])
    return Pair(up, down, torch.stack([ones if p.gain is None else p.gain for p in pairs]))
