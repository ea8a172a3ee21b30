"""How a module with adapted parameters computes: it runs its own forward on changed parameters.

The forward runs on a twin of the module whose stacks are a `ChangedWeight`
(kernels/factored_weight.py), so its products with them become products with the base's weight and
the adapters' factors. Another forward that reads such a parameter gets the changed one too.
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
from lorakin.inject.experts import (
    PREFIX,
    ExpertMatrix,
    ExpertStack,
    are_experts,
    matrix_count,
    stacks,
)
from lorakin.kernels.autograd import Copied, Version
from lorakin.kernels.factored_weight import ChangedWeight, WeightChange, formed, readable_weight

ALIGNED = 8
"""Ranks are padded to a multiple of this: grouped kernels need rows of a multiple of 16 bytes."""

Branches = Mapping[str, Mapping[int, Any]]
"""The branches of the adapters in use on a stack, by adapter and by number of the matrix."""


class AdaptedExperts(Swapped):
    """Mixed in before the class of a module that owns an adapted stack."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight_of = weight_for_forward if are_experts(self) else weight_for_readers
        changed = {stack.name: weight_of(stack) for stack in stacks(self)}
        weights = {name: weight for name, weight in changed.items() if weight is not None}
        if torch.compiler.is_compiling():
            # The twin below cannot be traced: it is a module made in a forward.
            vars(self).update(weights)
            out = super().forward(*args, **kwargs)
            for name in weights:
                del vars(self)[name]
            return out

        twin = object.__new__(type(self))
        # Attributes are found before parameters.
        vars(twin).update(vars(self), **weights)
        out = super(AdaptedExperts, twin).forward(*args, **kwargs)
        # Keep what the forward assigned to `self`.
        vars(self).update({key: value for key, value in vars(twin).items() if key not in weights})
        return out

    def __getattr__(self, name: str) -> Any:
        stack = vars(self).get("_modules", {}).get(PREFIX + name)
        if not isinstance(stack, ExpertStack) or not is_in_forward(1):
            return super().__getattr__(name)
        weight = weight_for_readers(stack)
        return super().__getattr__(name) if weight is None else weight


def attach(matrix: ExpertMatrix) -> None:
    """Puts an adapted matrix beside its parameter, and swaps its owner's class."""
    owner = matrix.owner
    if not isinstance(owner, AdaptedExperts):
        swap_class(owner, combined(AdaptedExperts, type(owner)))
    stack = owner._modules.setdefault(PREFIX + matrix.stack, ExpertStack(owner, matrix.stack))
    assert stack is not None
    stack._modules[str(matrix.number)] = matrix


def detach(matrix: ExpertMatrix) -> None:
    """Undoes `attach`."""
    owner = matrix.owner
    stack = owner._modules[PREFIX + matrix.stack]
    assert stack is not None
    del stack._modules[str(matrix.number)]
    if not stack._modules:
        del owner._modules[PREFIX + matrix.stack]
    if not stacks(owner):
        unmix(owner, AdaptedExperts)


def weight_for_forward(stack: ExpertStack) -> Tensor | None:
    """Returns a stack of experts with the changes of the adapters in use; None if there are none.

    While nothing trains and no gradient is wanted, the same `ChangedWeight` is returned again as
    long as the weight, the adapters' values and their scales stay the same.
    """
    branches = _branches(stack)
    if not branches:
        return None
    weight, by_columns = stack.parameter, not stack.is_transposed
    if torch.compiler.is_compiling():
        return formed(weight, _changes(stack, weight, branches), by_columns)

    first_of_each = [next(iter(of_one.values())) for of_one in branches.values()]
    scales = [branch.scale for branch in first_of_each]
    parameters = _tensors(branches)
    drops = any(branch.training and branch.method.dropout for branch in first_of_each)
    trains = any(parameter.requires_grad for parameter in parameters)
    if drops or trains or torch.is_grad_enabled():
        stack.kept = None
        return ChangedWeight(weight, _changes(stack, weight, branches), by_columns)

    if stack.kept is not None:
        version, copied, changed, kept_scales = stack.kept
        is_still = version.is_still(weight) and copied.is_still(*parameters)
        if kept_scales == scales and is_still:
            return changed  # type: ignore[no-any-return]
    changed = ChangedWeight(weight, _changes(stack, weight, branches), by_columns)
    version, copied = Version.of(weight), Copied.of(*parameters)
    can_keep = version is not None and copied is not None
    stack.kept = (version, copied, changed, scales) if can_keep else None
    return changed


def weight_for_readers(stack: ExpertStack) -> Tensor | None:
    """Returns what `weight_for_forward` does, for code that may pass it to an autograd function."""
    if not (branches := _branches(stack)):
        return None
    weight = stack.parameter

    def make() -> tuple[WeightChange, ...]:
        with torch.autocast(weight.device.type, enabled=False):
            return _changes(stack, weight, branches)

    return readable_weight(weight, make, not stack.is_transposed, _tensors(branches))


def _branches(stack: ExpertStack) -> Branches:
    """Returns the branches in use, except those in a mixed batch, which stacks cannot be in."""
    branches: dict[str, dict[int, Any]] = {}
    for number, attached in stack.attached().items():
        for name in attached.names_in_use() if attached.mixed_batch is None else ():
            branches.setdefault(name, {})[number] = attached[name]
    return branches


def _tensors(branches: Branches) -> list[Tensor]:
    """Returns the tensors of these branches."""
    all_branches = (branch for by_number in branches.values() for branch in by_number.values())
    return [parameter for branch in all_branches for parameter in branch._parameters.values()]


def _changes(stack: ExpertStack, weight: Tensor, branches: Branches) -> tuple[WeightChange, ...]:
    return tuple(_change(stack, weight, of_one) for of_one in branches.values())


def _change(stack: ExpertStack, weight: Tensor, branches: Mapping[int, Any]) -> WeightChange:
    """Returns one adapter's change of the stack: its pairs side by side.

    A matrix that it does not adapt has a pair of zeros.
    """
    first, attached = next(iter(branches.values())), stack.attached()

    def base_weight_of(number: int) -> Tensor:
        if not first.method.has_gain:
            return weight  # only a gain depends on the values of the weight
        matrix: Any = stack._modules[str(number)]
        base_weight: Tensor = attached[number].base_before_merge.get("weight", matrix.weight)
        return base_weight.detach()

    pairs = {
        n: branch.scaled_pair(branch.float32_tensors(weight.device), base_weight_of(n))
        for n, branch in branches.items()
    }
    outputs, inputs = first.shape[:2]
    no_pair = ScaledPair(Pair(weight.new_zeros(outputs, 0), weight.new_zeros(0, inputs)), 0.0)
    up, down, gain = side_by_side([pairs.get(n, no_pair) for n in range(matrix_count(weight))])
    up, down = up.to(weight.dtype), down.to(weight.dtype)
    left, right = (down.mT, up.mT) if stack.is_transposed else (up, down)

    is_merged = any(attached[number].base_before_merge for number in branches)
    gain_weight = stack.base_parameter() if gain is not None and is_merged else None
    dropout = _dropout(stack, first)
    if weight.dim() == 3:
        return WeightChange(left, right, gain, gain_weight, dropout)
    gain = None if gain is None else gain[0]
    return WeightChange(left[0], right[0], gain, gain_weight, dropout)


def _dropout(stack: ExpertStack, branch: Any) -> float:
    """Returns the dropout of a branch now; 0, with a warning, if there are no inputs to drop."""
    dropout: float = branch.method.dropout if branch.training else 0.0
    if not dropout or are_experts(stack.owner):
        return dropout
    warnings.warn(
        f"the dropout of the adapter does not act in {branch.path}: it is a parameter of a "
        f"{base_class(stack.owner).__name__}, and dropout is for the inputs of a layer",
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
    rank = max(pair.down.shape[0] for pair, _ in scaled)
    pairs = [pair if pair.down.shape[0] == rank else padded(pair, rank) for pair, _ in scaled]
    up, down = torch.stack([pair.up for pair in pairs]), torch.stack([pair.down for pair in pairs])
    if len(scales) == 1:
        up = up * scales.pop()
    else:
        by_pair = torch.tensor([scale for _, scale in scaled], dtype=up.dtype, device=up.device)
        up = up * by_pair.view(-1, 1, 1)
    if missing := -rank % ALIGNED if rank else ALIGNED:
        up, down = F.pad(up, (0, missing)), F.pad(down, (0, 0, 0, missing))

    if all(pair.gain is None for pair in pairs):
        return Pair(up, down)
    ones = up.new_ones(up.shape[1])
    return Pair(up, down, torch.stack([ones if p.gain is None else p.gain for p in pairs]))
